// log and exp as ../reference/elementary.py writes them out, in a form that compilers vectorise: no branches, no calls,
// no fused multiply-adds (-ffp-contract=off). Every result is the reference's bit for bit. tanh is of logits only.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "level.h"

namespace {

template <typename To, typename From>
SELFGEN_INLINE To bit_cast(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

constexpr float kLog2E = 1.44269502f, kLn2High = 0.693359375f, kLn2Low = 2.12194440e-4f;  // log 2 = high - low

// x = 2^k (1 + f) of a positive normal x, 1 + f within sqrt(1/2) and sqrt(2).
struct Split {
  explicit SELFGEN_INLINE Split(float x) {
    const int32_t bits = bit_cast<int32_t>(x);
    k = (bits - 0x3F3504F3) >> 23;
    f = bit_cast<float>(bits - k * (1 << 23)) - 1;
  }
  float f;
  int32_t k;
};

// log(1 + f) + k log 2.
SELFGEN_INLINE float log_of(float f, int32_t whole) {
  const float k = float(whole), square = f * f;
  float series = f * 7.0376836292e-2f;
  series = (series - 1.1514610310e-1f) * f;
  series = (series + 1.1676998740e-1f) * f;
  series = (series - 1.2420140846e-1f) * f;
  series = (series + 1.4249322787e-1f) * f;
  series = (series - 1.6668057665e-1f) * f;
  series = (series + 2.0000714765e-1f) * f;
  series = (series - 2.4999993993e-1f) * f;
  series = (series + 3.3333331174e-1f) * f * square;
  series = series - k * kLn2Low - square * 0.5f;
  return (f + series) + k * kLn2High;
}

// log(x) of a positive normal x.
SELFGEN_INLINE float log_(float x) {
  const Split split(x);
  return log_of(split.f, split.k);
}

// log of a probability; -inf below 2^-126, NaN for what is none.
inline float log_of_share(double share) {
  if (share >= 0x1p-126) return log_(float(share));
  return share >= 0 ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
}

// exp(x) of x <= 0 or NaN, about 1e-38 below -87.
SELFGEN_INLINE float exp_(float x) {
  x = x < -87.f ? -87.f : x;
  const float rounded = x * kLog2E + 0x1.8p23f;  // to a whole n, in the lowest bits; a cast of NaN has no meaning
  const float n = rounded - 0x1.8p23f;
  const float r = (x - n * kLn2High) + n * kLn2Low;
  float series = r * (1 / 5040.f);
  series = (series + 1 / 720.f) * r;
  series = (series + 1 / 120.f) * r;
  series = (series + 1 / 24.f) * r;
  series = (series + 1 / 6.f) * r;
  series = (series + 1 / 2.f) * r;
  series = (series + 1) * r;
  return (series + 1) * bit_cast<float>((bit_cast<uint32_t>(rounded) + 127) << 23);
}

// A probability 0 <= e <= 1 in units of 2^-23, rounded to a whole one: a term of a group's mass.
SELFGEN_INLINE uint32_t mass_term(float e) { return bit_cast<uint32_t>(e + 1) - 0x3F800000u; }

// A probability 0 <= e <= 64, rounded to a whole multiple of 2^-34. Doubles add up to 2^19 of it exactly.
SELFGEN_INLINE float weight(float e) { return e < 0x1p-11f ? (e + 0x1p-11f) - 0x1p-11f : e; }

constexpr double kWeightUnit = 0x1p34;  // weights in units of 1 / kWeightUnit are integers

// That of a probability e < 2^-11 in units.
SELFGEN_INLINE uint32_t small_weight(float e) { return bit_cast<uint32_t>(e + 0x1p-11f) - bit_cast<uint32_t>(0x1p-11f); }

// log of a sum of weights in these units.
inline float log_weight(int64_t sum) { return log_(float(sum) * 0x1p-34f); }

// tanh(x), NaN included: Taylor's series near 0, where the quotient would cancel.
SELFGEN_INLINE float tanh_(float x) {
  const float size = x < 0 ? -x : x, x2 = x * x;
  const float e = exp_(-2 * size), quotient = (1 - e) / (1 + e);
  const float series = x2 * (-1 / 3.f + x2 * (2 / 15.f + x2 * (-17 / 315.f + x2 * (62 / 2835.f))));
  return size < 0.25f ? x + x * series : (x < 0 ? -quotient : quotient);
}

}  // namespace
