// sample_mix on CPU; its contract is in ops/sampling.py.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "rows.h"
#include "sampling.h"

#include <vector>

namespace {

template <typename T>
void sample(const at::Tensor& logits, const Rows& rows, std::vector<int64_t>& drawn) {
  const auto row = [&, data = logits.const_data_ptr<T>()](int64_t i) {
    const Row& row = rows.selected[i];
    return LogitsRow<T>{data + row.index * logits.stride(0), logits.size(1), row.scale};
  };
  sample_rows(row, logits.size(1), rows.selected.data(), drawn.size(), drawn.data());
}

Mixed sample_mix(
    const at::Tensor& logits, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed,
    const at::Tensor& sample_ids, const at::Tensor& positions, const at::Tensor& inv_temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p) {
  check_shape(logits, "logits", {kAny, kAny});
  check_vocabulary(logits.size(1));
  check(reference, "reference", at::kLong, {logits.size(0)});
  const Rows rows(logits.size(0), threshold, seed, sample_ids, positions, inv_temperature, top_k, top_p, min_p);
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
