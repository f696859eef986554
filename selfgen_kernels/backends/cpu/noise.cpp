// gumbel_noise and self_mask on CPU; their contract is in ops/noise.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "random.h"

#include <algorithm>
#include <cstring>

namespace {

at::Tensor gumbel_noise(
    int64_t seed, const at::Tensor& sample_ids, const at::Tensor& positions, int64_t size, int64_t stream) {
  check_keys(sample_ids, positions, sample_ids.numel());
  TORCH_CHECK_VALUE(0 <= size && size <= 1 << 30, "size=", size, " is not accepted; pass 0 <= size <= 2**30");
  TORCH_CHECK_VALUE(0 <= stream && stream < 16, "stream=", stream, " is not accepted; pass 0 <= stream <= 15");
  const at::Tensor ids = sample_ids.to(at::kLong).contiguous(), at_positions = positions.to(at::kLong).contiguous();
  at::Tensor out = at::empty({ids.size(0), size}, ids.options().dtype(at::kFloat));
  const int64_t *id = ids.const_data_ptr<int64_t>(), *position = at_positions.const_data_ptr<int64_t>();
  float* result = out.data_ptr<float>();
  at::parallel_for(0, ids.size(0), 1 + 4096 / (1 + size), [&](int64_t begin, int64_t end) {
    float noise[kGroup];
    for (int64_t row = begin; row < end; ++row) {
      const RowKey key(seed, id[row], position[row]);
      for (int64_t start = 0; start < size; start += kGroup) {
        gumbel64(key, uint32_t(stream), uint32_t(start), noise);
        std::memcpy(result + row * size + start, noise, std::min(kGroup, size - start) * sizeof(float));
      }
    }
  });
  return out;
}

at::Tensor self_mask(
    int64_t seed, const at::Tensor& sample_ids, const at::Tensor& positions, const at::Tensor& threshold) {
  check_keys(sample_ids, positions, sample_ids.numel());
  check(threshold, "threshold", at::kLong, {sample_ids.numel()});
  const at::Tensor ids = sample_ids.to(at::kLong).contiguous(), at_positions = positions.to(at::kLong).contiguous();
  const at::Tensor thresholds = threshold.contiguous();
  at::Tensor out = at::empty({ids.size(0)}, ids.options().dtype(at::kBool));
  const int64_t *id = ids.const_data_ptr<int64_t>(), *position = at_positions.const_data_ptr<int64_t>();
  const int64_t* below = thresholds.const_data_ptr<int64_t>();
  bool* result = out.data_ptr<bool>();
  at::parallel_for(0, ids.size(0), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      result[row] = in_mask(RowKey(seed, id[row], position[row]), below[row]);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) {
  m.impl("gumbel_noise", gumbel_noise);
  m.impl("self_mask", self_mask);
}
