// invariant_linear on CPU; its contract is in ops/linear.py. The products are those of a head (head_rows.h), of which
// only the weight decides in which order a sum adds: not how many rows there are, nor how many threads.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "head_rows.h"

#include <algorithm>
#include <cstdint>
#include <optional>

namespace {

constexpr int64_t kRows = 192;  // multiplied at a time: with some hundred numbers each, they stay in a core's cache

template <typename T>
void multiply_all(const HeadArguments& arguments, at::Tensor& out) {
  const int64_t size = out.size(1);
  for (int64_t begin = 0; begin < out.size(0); begin += kRows) {
    const int64_t count = std::min(kRows, out.size(0) - begin);
    const HeadRows<T> products(arguments, count, [&](int64_t i) { return begin + i; });
    const int64_t lanes = products.lanes();
    T* const to = out.data_ptr<T>() + begin * size;
    products.for_each_group([&](int64_t, int64_t, int64_t first, int64_t ids, const float* logits) {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < ids; ++i) to[row * size + first + i] = T(logits[i * lanes + row]);
      }
      return true;
    });
  }
}

at::Tensor invariant_linear(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias) {
  check_shape(hidden, "hidden", {kAny, kAny});
  check(weight, "weight", hidden.scalar_type(), {kAny, hidden.size(1)});
  check(bias, "bias", hidden.scalar_type(), {weight.size(0)});
  at::Tensor out = at::empty({hidden.size(0), weight.size(0)}, hidden.options());
  if (out.numel() == 0) return out;
  const HeadArguments arguments{hidden, weight, bias, std::nullopt, 1};
  switch (hidden.scalar_type()) {
    case at::kFloat: multiply_all<float>(arguments, out); break;
    case at::kBFloat16: multiply_all<at::BFloat16>(arguments, out); break;
    case at::kHalf: multiply_all<at::Half>(arguments, out); break;
    default: TORCH_CHECK_TYPE(false, "hidden must be float32, bfloat16 or float16, got ", hidden.scalar_type());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) { m.impl("invariant_linear", invariant_linear); }
