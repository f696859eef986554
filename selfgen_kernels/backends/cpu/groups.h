// Loops over the vocabulary in groups of 64: from logits to z, maxima, sums of exponentials.
//
// They are compiled for several x86 levels (level.h). Fused multiply-adds are off, so every level gives the same bits.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "elementary.h"
#include "random.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

inline int64_t groups_of(int64_t vocab_size) { return (vocab_size + kGroup - 1) / kGroup; }

// z of one group, and its maximum: scaled, filtered, -inf past the end of the row, +inf in place of NaN.
template <typename T>
SELFGEN_INLINE float load_group_(const T* logits, int64_t size, float scale, float cutoff, float z[kGroup]) {
  float largest[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) largest[i] = -kInf;
  if (size < kGroup) {
    for (int64_t i = 0; i < kGroup; ++i) z[i] = i < size ? float(logits[i]) * scale : -kInf;
  } else {
    for (int64_t i = 0; i < kGroup; ++i) z[i] = float(logits[i]) * scale;
  }
  for (int64_t j = 0; j < kGroup; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      float x = z[j + i];
      x = x == x ? x : kInf;
      x = x < cutoff ? -kInf : x;
      z[j + i] = x;
      largest[i] = x > largest[i] ? x : largest[i];
    }
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) largest[i] = largest[i] > largest[i + width] ? largest[i] : largest[i + width];
  }
  return largest[0];
}

// The maxima of the groups begin, .., end - 1 of a row.
template <typename T>
SELFGEN_INLINE void group_maxima_(
    const T* logits, int64_t vocab_size, float scale, int64_t begin, int64_t end, float* maxima) {
  float z[kGroup];
  for (int64_t group = begin; group < end; ++group) {
    const int64_t size = vocab_size - group * kGroup;
    maxima[group] = load_group_(logits + group * kGroup, size < kGroup ? size : kGroup, scale, -kInf, z);
  }
}

#define SELFGEN_LOGITS(T)                                                                                            \
  SELFGEN_CLONES(                                                                                                    \
      float, load_group, (const T* logits, int64_t size, float scale, float cutoff, float z[kGroup]),                \
      (logits, size, scale, cutoff, z))                                                                              \
  SELFGEN_CLONES(                                                                                                    \
      void, group_maxima,                                                                                            \
      (const T* logits, int64_t vocab_size, float scale, int64_t begin, int64_t end, float* maxima),                 \
      (logits, vocab_size, scale, begin, end, maxima))
SELFGEN_LOGITS(float)
SELFGEN_LOGITS(c10::BFloat16)
SELFGEN_LOGITS(c10::Half)
#undef SELFGEN_LOGITS

// The sum of exp(z - shift) over a group, none of whose z is larger than shift.
SELFGEN_INLINE float sum_exp_(const float z[kGroup], float shift) {
  float sum[kLanes] = {};
  for (int64_t j = 0; j < kGroup; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) sum[i] += exp_(z[j + i] - shift);
  }
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}
SELFGEN_CLONES(float, sum_exp, (const float z[kGroup], float shift), (z, shift))

// Of a part of a row: its largest logit, +inf if one of them is NaN, and the sum of exp(logit - peak).
struct Mass {
  float peak = -kInf;
  double sum = 0;
};

// The mass of the groups begin, .., end - 1 of a row.
template <typename T>
SELFGEN_INLINE Mass mass_of_(const T* logits, int64_t vocab_size, int64_t begin, int64_t end) {
  Mass mass;
  float z[kGroup];
  for (int64_t group = begin; group < end; ++group) {
    const int64_t size = vocab_size - group * kGroup;
    const float largest = load_group_(logits + group * kGroup, size < kGroup ? size : kGroup, 1, -kInf, z);
    if (largest > mass.peak) {
      mass.sum *= exp_(mass.peak - largest);
      mass.peak = largest;
    }
    if (mass.peak > -kInf) mass.sum += sum_exp_(z, mass.peak);
  }
  return mass;
}

#define SELFGEN_MASS(T)                                                                    \
  SELFGEN_CLONES(                                                                          \
      Mass, mass_of, (const T* logits, int64_t vocab_size, int64_t begin, int64_t end),    \
      (logits, vocab_size, begin, end))
SELFGEN_MASS(float)
SELFGEN_MASS(c10::BFloat16)
SELFGEN_MASS(c10::Half)
#undef SELFGEN_MASS

// log softmax(row) of a token whose logit is z, -inf if the row lacks it, from the masses of the row's `count` parts; 0
// for a row without probabilities.
inline float log_prob(float z, const Mass* parts, int64_t count) {
  float peak = -kInf;
  for (int64_t i = 0; i < count; ++i) peak = std::max(peak, parts[i].peak);
  if (!(-kInf < peak && peak < kInf)) return 0;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += parts[i].sum * exp_(parts[i].peak - peak);
  return float(double(z) - peak - std::log(sum));
}

// A row of logits, or of some part of the vocabulary.
template <typename T>
struct LogitsRow {
  int64_t groups() const { return groups_of(vocab_size); }
  float load(int64_t group, float cutoff, float z[kGroup]) const {
    const int64_t start = group * kGroup;
    return load_group(logits + start, std::min(kGroup, vocab_size - start), scale, cutoff, z);
  }
  void maxima(int64_t begin, int64_t end, float* out) const {
    group_maxima(logits, vocab_size, scale, begin, end, out);
  }
  const T* logits;  // dense
  int64_t vocab_size;
  float scale;
  static constexpr double mass = 0;  // not known before all values are summed
};

}  // namespace
