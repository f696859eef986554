// sample_mix and reference_log_prob on CPU; their contract is in ops/sampling.py.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "rows.h"
#include "sampling.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kSpan = 256;  // groups that a thread sums up at a time, so that threads share a few rows, too

// Calls f(data, row_stride) with logits [N, V] whose ids lie side by side.
template <typename F>
void with_rows(const at::Tensor& logits, F f) {
  const at::Tensor dense = logits.stride(1) == 1 ? logits : logits.contiguous();
  switch (dense.scalar_type()) {
    case at::kFloat: return f(dense.const_data_ptr<float>(), dense.stride(0));
    case at::kBFloat16: return f(dense.const_data_ptr<at::BFloat16>(), dense.stride(0));
    case at::kHalf: return f(dense.const_data_ptr<at::Half>(), dense.stride(0));
    default: TORCH_CHECK_TYPE(false, "logits must be float32, bfloat16 or float16, got ", dense.scalar_type());
  }
}

Mixed sample_mix(
    const at::Tensor& logits, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed,
    const at::Tensor& sample_ids, const at::Tensor& positions, const at::Tensor& inv_temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p) {
  check_shape(logits, "logits", {kAny, kAny});
  check_vocabulary(logits.size(1));
  check(reference, "reference", at::kLong, {logits.size(0)});
  const Rows rows(logits.size(0), threshold, seed, sample_ids, positions, inv_temperature, top_k, top_p, min_p);
  std::vector<int64_t> drawn(rows.selected.size());
  with_rows(logits, [&](const auto* data, int64_t stride) {
    const auto row = [&](int64_t i) {
      const Row& row = rows.selected[i];
      return LogitsRow<std::decay_t<decltype(*data)>>{data + row.index * stride, logits.size(1), row.scale};
    };
    sample_rows(row, logits.size(1), rows.selected.data(), drawn.size(), drawn.data());
  });
  return mix(reference, rows, drawn);
}

at::Tensor reference_log_prob(
    const at::Tensor& logits, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed,
    const at::Tensor& sample_ids, const at::Tensor& positions) {
  check_shape(logits, "logits", {kAny, kAny});
  const int64_t count = logits.size(0), vocab_size = logits.size(1);
  check_vocabulary(vocab_size);
  check(reference, "reference", at::kLong, {count});
  const at::Tensor temperature = at::ones({count}, at::kFloat), tokens = reference.contiguous();
  const Rows rows(count, threshold, seed, sample_ids, positions, temperature, {}, {}, {});
  const std::vector<Row>& selected = rows.selected;
  const int64_t groups = groups_of(vocab_size), spans = (groups + kSpan - 1) / kSpan;
  std::vector<Mass> masses(selected.size() * spans);
  at::Tensor result = at::zeros({count}, at::kFloat);
  float* const out = result.data_ptr<float>();
  const int64_t* const token = tokens.const_data_ptr<int64_t>();
  with_rows(logits, [&](const auto* data, int64_t stride) {
    at::parallel_for(0, masses.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % spans * kSpan;
        const auto* row = data + selected[i / spans].index * stride;
        masses[i] = mass_of(row, vocab_size, first, std::min(first + kSpan, groups));
      }
    });
    for (size_t i = 0; i < selected.size(); ++i) {
      const int64_t at = selected[i].index;
      const bool known = 0 <= token[at] && token[at] < vocab_size;
      const float z = known ? float(data[at * stride + token[at]]) : -kInf;
      out[at] = log_prob(z, masses.data() + i * spans, spans);
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) {
  m.impl("sample_mix", sample_mix);
  m.impl("reference_log_prob", reference_log_prob);
}
