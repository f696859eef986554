// sample_mix and reference_log_prob on CPU; their contract is in ops/sampling.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "groups.h"
#include "rows.h"
#include "sampling.h"

#include <algorithm>
#include <cstdint>
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

void check_logits(const at::Tensor& logits) {
  check_shape(logits, "logits", {kAny, kAny});
  check_vocabulary(logits.size(1));
}

Mixed sample_mix(const at::Tensor& logits, const Sampling& sampling) {
  check_logits(logits);
  const Rows rows(logits.size(0), sampling);
  std::vector<int64_t> drawn(rows.selected.size());
  with_rows(logits, [&](const auto* data, int64_t stride) {
    const auto row = [&](int64_t i) {
      const Row& row = rows.selected[i];
      return LogitsRow<std::decay_t<decltype(*data)>>{data + row.index * stride, logits.size(1), row.scale};
    };
    sample_rows(row, logits.size(1), rows.selected.data(), drawn.size(), drawn.data());
  });
  return mix(rows, drawn);
}

at::Tensor reference_log_prob(const at::Tensor& logits, const Sampling& sampling) {
  check_logits(logits);
  const Rows rows(logits.size(0), sampling);
  const std::vector<Row>& selected = rows.selected;
  const int64_t vocab_size = logits.size(1), groups = groups_of(vocab_size), spans = (groups + kSpan - 1) / kSpan;
  std::vector<float> z(selected.size(), -kInf);
  std::vector<float> peaks(selected.size() * groups);
  std::vector<uint32_t> masses(selected.size() * groups);
  const int64_t* const tokens = rows.reference.const_data_ptr<int64_t>();
  with_rows(logits, [&](const auto* data, int64_t stride) {
    at::parallel_for(0, selected.size() * spans, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % spans * kSpan, own = i / spans * groups;
        const auto* row = data + selected[i / spans].index * stride;
        const int64_t last = std::min(first + kSpan, groups);
        group_masses(row, vocab_size, first, last, peaks.data() + own, masses.data() + own);
      }
    });
    for (size_t i = 0; i < selected.size(); ++i) {
      const int64_t index = selected[i].index, token = tokens[index];
      if (0 <= token && token < vocab_size) z[i] = float(data[index * stride + token]);
    }
  });
  return log_probs(rows, z, peaks, masses, groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) {
  using Op = SamplingOp<const at::Tensor&>;
  m.impl("sample_mix", Op::mix<sample_mix>);
  m.impl("reference_log_prob", Op::log_prob<reference_log_prob>);
}
