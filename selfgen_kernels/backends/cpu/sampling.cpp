// sample_mix on CPU; its contract is in ops/sampling.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "rows.h"
#include "sampling.h"

#include <vector>

namespace {

template <typename T>
void sample(const at::Tensor& logits, const Rows& rows, std::vector<int64_t>& drawn) {
  const T* data = logits.const_data_ptr<T>();
  const int64_t vocab_size = logits.size(1), groups = groups_of(vocab_size), count = rows.selected.size();
  const int64_t per_thread = sample_row_scratch(vocab_size, rows.filtered);
  const auto logits_of = [&](const Row& row) {
    return LogitsRow<T>{data + row.index * logits.stride(0), vocab_size, row.scale};
  };
  const bool few = count < at::get_num_threads();  // then threads share rows
  at::Tensor scratch = at::empty({few ? 1 : at::get_num_threads(), per_thread}, at::kFloat);
  if (few) {
    float* const maxima = scratch.data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) {
      const LogitsRow<T> row = logits_of(rows.selected[i]);
      at::parallel_for(0, groups, 256, [&](int64_t begin, int64_t end) { row.maxima(begin, end, maxima); });
      drawn[i] = sample_row(row, rows.selected[i], maxima);
    }
  } else {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      float* const maxima = scratch.data_ptr<float>() + at::get_thread_num() * per_thread;
      for (int64_t i = begin; i < end; ++i) {
        const LogitsRow<T> row = logits_of(rows.selected[i]);
        row.maxima(0, groups, maxima);
        drawn[i] = sample_row(row, rows.selected[i], maxima);
      }
    });
  }
}

Mixed sample_mix(
    const at::Tensor& logits, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed,
    const at::Tensor& sample_ids, const at::Tensor& positions, const at::Tensor& inv_temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p) {
  const Rows rows(threshold, seed, sample_ids, positions, inv_temperature, top_k, top_p, min_p);
  const at::Tensor dense = logits.stride(1) == 1 ? logits : logits.contiguous();
  std::vector<int64_t> drawn(rows.selected.size());
  switch (dense.scalar_type()) {
    case at::kFloat: sample<float>(dense, rows, drawn); break;
    case at::kBFloat16: sample<at::BFloat16>(dense, rows, drawn); break;
    case at::kHalf: sample<at::Half>(dense, rows, drawn); break;
    default: TORCH_CHECK_TYPE(false, "logits must be float32, bfloat16 or float16, got ", dense.scalar_type());
  }
  return mix(reference, rows, drawn);
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) { m.impl("sample_mix", sample_mix); }
