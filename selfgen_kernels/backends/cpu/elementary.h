// log, exp and tanh in a form that compilers vectorise: a few ulp over the ranges used here, no branches, no calls.

#pragma once

#include <cstdint>
#include <cstring>

#include "level.h"

namespace {

constexpr float kLn2 = 0.69314718056f;

template <typename To, typename From>
SELFGEN_INLINE To bit_cast(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// log(x) of a positive normal x = 2^e m with m in [sqrt(1/2), sqrt(2)), by log(m) = 2 atanh((m - 1) / (m + 1)).
SELFGEN_INLINE float log_(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - bit_cast<int32_t>(0.70710677f)) >> 23;
  const float m = bit_cast<float>(bits - exponent * (1 << 23));
  const float s = (m - 1) / (m + 1), s2 = s * s;
  const float series = s2 * (1 / 3.f + s2 * (1 / 5.f + s2 * (1 / 7.f + s2 * (1 / 9.f))));
  return exponent * kLn2 + 2 * (s + s * series);
}

// exp(x) of x <= 0 or NaN, about 1e-38 below -87: Taylor's series for |x - n log 2| <= log(2) / 2, times 2^n.
SELFGEN_INLINE float exp_(float x) {
  x = x < -87.f ? -87.f : x;
  const float rounded = x * (1 / kLn2) + 0x1.8p23f;  // to a whole n, in the lowest bits; a cast of NaN has no meaning
  const float n = rounded - 0x1.8p23f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, of which n times the first is exact
  const float high = 1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f)));
  const float series = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * high)));
  return series * bit_cast<float>((bit_cast<uint32_t>(rounded) + 127) << 23);
}

// tanh(x), NaN included: Taylor's series near 0, where the quotient would cancel.
SELFGEN_INLINE float tanh_(float x) {
  const float size = x < 0 ? -x : x, x2 = x * x;
  const float e = exp_(-2 * size), quotient = (1 - e) / (1 + e);
  const float series = x2 * (-1 / 3.f + x2 * (2 / 15.f + x2 * (-17 / 315.f + x2 * (62 / 2835.f))));
  return size < 0.25f ? x + x * series : (x < 0 ? -quotient : quotient);
}

}  // namespace
