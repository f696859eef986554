// rms_norm and add_rms_norm on CPU; their contract is in ops/norm.py, their steps are those of ../reference/norm.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "elementary.h"
#include "groups.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>

namespace {

constexpr int64_t kMostWidth = 1 << 14;
constexpr int32_t kLeastExponent = 65, kMostExponent = 190;  // of the peaks that numbers are scaled by

// Bits of the largest absolute value of some numbers, NaN being larger than any.
template <typename T>
SELFGEN_INLINE int32_t peak_of_(const T* x, int64_t width) {
  int32_t peak = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int32_t bits = bit_cast<int32_t>(float(x[i])) & 0x7FFFFFFF;
    peak = bits > peak ? bits : peak;
  }
  return peak;
}

// The sum of squares of numbers whose largest absolute value has these bits.
template <typename T>
SELFGEN_INLINE float square_sum_(const T* x, int64_t width, int32_t peak) {
  if (peak > (kMostExponent << 23 | 0x7FFFFF)) {  // its square overflows, or is NaN
    const float largest = bit_cast<float>(peak);
    return largest * largest;
  }
  const int32_t exponent = std::clamp(peak >> 23, kLeastExponent, kMostExponent);
  const float scale = bit_cast<float>((254 - exponent) << 23), back = bit_cast<float>(exponent << 23);
  const auto term = [&](int64_t i) {
    const float scaled = float(x[i]) * scale;
    return double(weight(scaled * scaled));
  };
  double sum[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += term(i + lane);
  }
  double total = 0;
  for (; i < width; ++i) total += term(i);
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return float(total) * back * back;
}

// One row of `out`: x normed, and times a factor each; rounded to T before that, or not.
template <typename T, typename Out>
SELFGEN_INLINE void norm_row_(
    const T* x, const float* factor, int64_t width, float eps, bool round_first, Out* out) {
  const float mean = square_sum_(x, width, peak_of_(x, width)) / float(width);
  const float inverse = 1 / std::sqrt(mean + eps);
  if (round_first) {
    for (int64_t i = 0; i < width; ++i) out[i] = Out(float(T(float(x[i]) * inverse)) * factor[i]);
  } else {
    for (int64_t i = 0; i < width; ++i) out[i] = Out(float(x[i]) * inverse * factor[i]);
  }
}

#define SELFGEN_NORM(T, Out)                                                                                   \
  SELFGEN_CLONES(                                                                                              \
      void, norm_row, (const T* x, const float* factor, int64_t width, float eps, bool round_first, Out* out), \
      (x, factor, width, eps, round_first, out))
SELFGEN_NORM(float, float)
SELFGEN_NORM(c10::BFloat16, c10::BFloat16)
SELFGEN_NORM(c10::Half, c10::Half)
SELFGEN_NORM(c10::BFloat16, float)
SELFGEN_NORM(c10::Half, float)
#undef SELFGEN_NORM

template <typename T, typename Out>
void norm_rows(const at::Tensor& x, const at::Tensor& factor, float eps, bool round_first, at::Tensor& out) {
  const T* const from = x.const_data_ptr<T>();
  const float* const factors = factor.const_data_ptr<float>();
  Out* const to = out.data_ptr<Out>();
  const int64_t width = x.size(1), stride = x.stride(0);
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, (1 << 14) / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      norm_row(from + row * stride, factors, width, eps, round_first, to + row * width);
    }
  });
}

constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kBFloat16, at::kHalf};

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool plus_one, bool round_first) {
  check(x, "x", kDtypes, {kAny, kAny});
  check(weight, "weight", kDtypes, {x.size(1)});
  TORCH_CHECK_VALUE(
      1 <= x.size(1) && x.size(1) <= kMostWidth, "x has rows of ", x.size(1), " numbers; pass 1 to ", kMostWidth);
  const at::Tensor dense = x.stride(1) == 1 ? x : x.contiguous();
  at::Tensor factor = weight.to(at::kFloat).contiguous();
  if (plus_one) factor = factor + 1;
  const at::ScalarType from = x.scalar_type();
  const at::ScalarType to = round_first ? c10::promoteTypes(from, weight.scalar_type()) : from;
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(to));
  const auto run = [&](auto number) {
    using T = decltype(number);
    if (to == from) return norm_rows<T, T>(dense, factor, float(eps), round_first, out);
    norm_rows<T, float>(dense, factor, float(eps), round_first, out);
  };
  if (from == at::kFloat) {
    run(float());
  } else if (from == at::kBFloat16) {
    run(c10::BFloat16());
  } else {
    run(c10::Half());
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps, bool plus_one,
    bool round_first) {
  check(x, "x", kDtypes, {kAny, kAny});
  check(residual, "residual", kDtypes, x.sizes());
  const at::Tensor total = at::add(x, residual).contiguous();
  return {total, rms_norm(total, weight, eps, plus_one, round_first)};
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm", add_rms_norm);
}
