// Loops over the vocabulary in groups of 64: from logits to z, maxima, masses and weights (reference/elementary.py).
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

// The mass of a group whose maximum is `largest`, finite: the sum of exp(z - largest) in units of 2^-23.
SELFGEN_INLINE uint32_t group_mass_(const float z[kGroup], float largest) {
  float e[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) e[i] = exp_(z[i] - largest);
  uint32_t total = 0;
  for (int64_t i = 0; i < kGroup; ++i) total += mass_term(e[i]);
  return total;
}
SELFGEN_CLONES(uint32_t, group_mass, (const float z[kGroup], float largest), (z, largest))

// A group's mass in units of 1.
SELFGEN_INLINE float mass_of(uint32_t mass) { return float(int32_t(mass)) * 0x1p-23f; }

// The weights of a group together, relative to a peak that no z is larger than; in units of 1, without rounding.
SELFGEN_INLINE double sum_weights_(const float z[kGroup], float peak) {
  double sum[kLanes] = {};
  for (int64_t j = 0; j < kGroup; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) sum[i] += double(weight(exp_(z[j + i] - peak)));
  }
  double total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}
SELFGEN_CLONES(double, sum_weights, (const float z[kGroup], float peak), (z, peak))

// The same in units, where all weights are small: those of z - peak < kSmall are less than 2^-11.
constexpr float kSmall = -7.63f;
SELFGEN_INLINE uint32_t sum_small_weights_(const float z[kGroup], float peak) {
  float e[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) e[i] = exp_(z[i] - peak);
  uint32_t total = 0;
  for (int64_t i = 0; i < kGroup; ++i) total += small_weight(e[i]);
  return total;
}
SELFGEN_CLONES(uint32_t, sum_small_weights, (const float z[kGroup], float peak), (z, peak))

constexpr int64_t kTogether = 8;  // groups, so that no one waits for a group's maximum

// The largest logits, +inf in place of NaN, and the masses of the groups begin, .., end - 1 of a row; where a peak is
// not finite, any mass.
template <typename T>
SELFGEN_INLINE void group_masses_(
    const T* logits, int64_t vocab_size, int64_t begin, int64_t end, float* peaks, uint32_t* masses) {
  float z[kTogether][kGroup];
  for (int64_t start = begin; start < end; start += kTogether) {
    const int64_t stop = start + kTogether < end ? start + kTogether : end;
    for (int64_t group = start; group < stop; ++group) {
      const int64_t size = vocab_size - group * kGroup;
      peaks[group] = load_group_(logits + group * kGroup, size < kGroup ? size : kGroup, 1, -kInf, z[group - start]);
    }
    for (int64_t group = start; group < stop; ++group) masses[group] = group_mass_(z[group - start], peaks[group]);
  }
}

#define SELFGEN_MASSES(T)                                                                                    \
  SELFGEN_CLONES(                                                                                            \
      void, group_masses,                                                                                    \
      (const T* logits, int64_t vocab_size, int64_t begin, int64_t end, float* peaks, uint32_t* masses),     \
      (logits, vocab_size, begin, end, peaks, masses))
SELFGEN_MASSES(float)
SELFGEN_MASSES(c10::BFloat16)
SELFGEN_MASSES(c10::Half)
#undef SELFGEN_MASSES

// The weights of 64 masses together, relative to a finite peak that none of their peaks is larger than; beside a peak of
// -inf, no mass has a weight.
SELFGEN_INLINE double weigh_masses_(const float peaks[kGroup], const uint32_t masses[kGroup], float peak) {
  double sum[kLanes] = {};
  for (int64_t j = 0; j < kGroup; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      sum[i] += double(weight(exp_(peaks[j + i] - peak) * mass_of(masses[j + i])));
    }
  }
  double total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}
SELFGEN_CLONES(
    double, weigh_masses, (const float peaks[kGroup], const uint32_t masses[kGroup], float peak), (peaks, masses, peak))

SELFGEN_INLINE float largest_of_(const float* values, int64_t count) {
  float largest[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) largest[i] = -kInf;
  const int64_t whole = count - count % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) largest[i] = values[j + i] > largest[i] ? values[j + i] : largest[i];
  }
  for (int64_t j = whole; j < count; ++j) largest[0] = values[j] > largest[0] ? values[j] : largest[0];
  for (int64_t i = 1; i < kLanes; ++i) largest[0] = largest[i] > largest[0] ? largest[i] : largest[0];
  return largest[0];
}
SELFGEN_CLONES(float, largest_of, (const float* values, int64_t count), (values, count))

// log softmax(row) of a token whose logit is z, -inf if the row lacks it, from the masses of the row's groups; 0 for a
// row without probabilities.
inline float log_prob(float z, const float* peaks, const uint32_t* masses, int64_t groups) {
  const float peak = largest_of(peaks, groups);
  if (!(-kInf < peak && peak < kInf)) return 0;
  const int64_t whole = groups - groups % kGroup;
  int64_t sum = 0;
  for (int64_t start = 0; start < whole; start += kGroup) {
    sum += int64_t(weigh_masses(peaks + start, masses + start, peak) * kWeightUnit);
  }
  if (whole < groups) {
    float own_peaks[kGroup];
    uint32_t own_masses[kGroup] = {};
    std::fill_n(own_peaks, kGroup, peak);
    std::copy(peaks + whole, peaks + groups, own_peaks);
    std::copy(masses + whole, masses + groups, own_masses);
    sum += int64_t(weigh_masses(own_peaks, own_masses, peak) * kWeightUnit);
  }
  return (z - peak) - log_weight(sum);
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
  static constexpr double mass = 0;  // not known before all weights are summed
};

}  // namespace
