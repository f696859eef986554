// The cutoff of top-k, top-p and min-p, as reference/scaling.py defines it, without sorting or copying a row.
//
// The maxima of the groups, known beforehand, bound the cutoff from below, and only groups that reach the bound are
// looked at: for top-k the k-th largest maximum, for top-p the value below which all V tokens together have less than
// 1 - p. Both filters then ask for the same: the smallest value with less than a target of weight above it, a weight
// being 1 or a probability. Sweeps over what is left find it by bins, of which only the critical one stays.

#pragma once

#include "groups.h"
#include "row.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>

namespace {

constexpr int kLogBins = 10;
constexpr int64_t kFewValues = 64;  // are sorted

// More than all rounding: in the logarithm of a bound, and relatively between a mass that is summed group by group and
// the sum of weights, each of which rounds by half a unit, too.
constexpr double kMassMargin = 0.01, kMassRounding = 2e-5;

// Unsigned integers in the order of the floats, -0 being 0, and back.
SELFGEN_INLINE uint32_t key_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
SELFGEN_INLINE float value_of(uint32_t key) { return bit_cast<float>(key >> 31 ? key ^ 0x80000000u : ~key); }

// The weights of 64 values, relative to the peak's, as whole numbers of units.
SELFGEN_INLINE void weights64_(const float values[kGroup], float peak, float* __restrict weights) {
  for (int64_t i = 0; i < kGroup; ++i) weights[i] = weight(exp_(values[i] - peak)) * float(kWeightUnit);
}
SELFGEN_CLONES(
    void, weights64, (const float values[kGroup], float peak, float* __restrict weights), (values, peak, weights))

// The finite values of a row, each with a weight: its probability relative to the peak's in whole units, or 1.
template <typename AnyRow>
struct Weighted {
  // Calls f(value, weight) for all values with keys first, .., last.
  template <typename F>
  void for_each(uint32_t first, uint32_t last, F f) const {
    float z[kGroup], values[kGroup], weights[kGroup];
    std::fill_n(values, kGroup, peak);
    std::fill_n(weights, kGroup, 1.f);
    for (int64_t group = 0; group < row.groups(); ++group) {
      if (maxima[group] < value_of(first)) continue;
      row.load(group, -kInf, z);
      int64_t count = 0;
      for (int64_t i = 0; i < kGroup; ++i) {
        values[count] = z[i];
        count += key_of(z[i]) - first <= last - first;
      }
      if (by_mass && count > 0) weights64(values, peak, weights);
      for (int64_t i = 0; i < count; ++i) f(values[i], int64_t(weights[i]));
    }
  }

  // Of the values that are at least `low`, in units.
  int64_t mass(float low) const {
    int64_t sum = 0;
    float z[kGroup];
    for (int64_t group = 0; group < row.groups(); ++group) {
      if (maxima[group] < low) continue;
      row.load(group, low, z);
      const bool small = maxima[group] - peak < kSmall;
      sum += small ? int64_t(sum_small_weights(z, peak)) : int64_t(sum_weights(z, peak) * kWeightUnit);
    }
    return sum;
  }

  const AnyRow& row;
  const float* maxima;
  float peak;
  bool by_mass;
};

// The smallest value that is at least `low` and has less than `target` of weight above it; the peak if there is none.
template <typename AnyRow>
float smallest_kept(const Weighted<AnyRow>& weighted, float low, double target) {
  uint32_t first = key_of(low), last = key_of(weighted.peak);  // what is sought is between them
  int64_t above = 0;                                           // weight of the values beyond the last
  for (;;) {
    int shift = 0;
    while ((last - first) >> shift >> kLogBins) ++shift;
    int64_t weight_of[1 << kLogBins] = {};
    int32_t count_of[1 << kLogBins] = {};
    weighted.for_each(first, last, [&](float value, int64_t weight) {
      const uint32_t bin = (last - key_of(value)) >> shift;  // the largest values first
      weight_of[bin] += weight;
      ++count_of[bin];
    });
    uint32_t critical = 0;  // the bin with which the target is reached, or the last that is not empty
    int64_t sum = above;
    for (uint32_t bin = 0; bin < 1 << kLogBins && (bin == 0 || double(sum) < target); ++bin) {
      if (count_of[bin] == 0) continue;
      critical = bin;
      above = sum;
      sum += weight_of[bin];
    }
    last -= critical << shift;
    first = std::max(first, last - std::min(last, (1u << shift) - 1));
    if (shift == 0) return value_of(first);
    if (count_of[critical] > kFewValues) continue;

    std::pair<float, int64_t> few[kFewValues];  // value, weight
    int64_t count = 0;
    weighted.for_each(first, last, [&](float value, int64_t weight) { few[count++] = {value, weight}; });
    std::sort(few, few + count, std::greater<std::pair<float, int64_t>>());
    float kept = few[0].first;
    for (int64_t i = 1; i < count; ++i) {
      above += few[i - 1].second;
      if (double(above) < target) kept = few[i].first;
    }
    return kept;
  }
}

// The logarithm of what each of all tokens may have, below the cutoff of top-p, of the `mass` >= 1 that they have
// together. A weight is never more than twice its probability, and from 2^-28 on less than 1% more.
inline double log_dropped(const Filters& filters, double mass, int64_t vocab_size) {
  const double share = (1 - std::max(0., filters.top_p)) / double(vocab_size);
  return std::log(share * mass) - kMassMargin - (share < 0x1p-28 ? std::log(2.) : 0);
}

// The cutoff of one row, whose largest maximum `peak` is finite. `scratch`: room for the maxima. NaN if the row's mass
// is known up to rounding only, and that leaves it open.
template <typename AnyRow>
float filter_cutoff(
    const AnyRow& row, const Filters& filters, const float* maxima, float peak, float* scratch) {
  const int64_t groups = row.groups(), k = std::max<int64_t>(1, filters.top_k);
  Weighted<AnyRow> weighted{row, maxima, peak, false};
  float cutoff = std::numeric_limits<float>::lowest();
  if (k < row.vocab_size) {
    float bound = cutoff;
    if (k <= groups) {
      std::copy_n(maxima, groups, scratch);
      std::nth_element(scratch, scratch + k - 1, scratch + groups, std::greater<float>());
      bound = std::max(bound, scratch[k - 1]);
    }
    cutoff = smallest_kept(weighted, bound, double(k));
  }
  if (filters.top_p < 1) {
    weighted.by_mass = true;
    const auto cutoff_of = [&](double mass) {  // in units
      const double dropped = log_dropped(filters, mass / kWeightUnit, row.vocab_size);
      const float bound = std::nextafter(float(peak + dropped), -kInf);
      return smallest_kept(weighted, std::max(cutoff, bound), std::max(0., filters.top_p) * mass);
    };
    if (row.mass > 0) {
      const double rounding = kMassRounding + double(row.vocab_size) / kWeightUnit;
      const float highest = cutoff_of(row.mass * kWeightUnit * (1 - rounding));
      if (cutoff_of(row.mass * kWeightUnit * (1 + rounding)) != highest) return std::nanf("");
      cutoff = highest;
    } else {
      cutoff = cutoff_of(double(weighted.mass(cutoff)));
    }
  }
  const float by_min_p = peak + filters.log_min_p;  // NaN for a min_p that no one could accept: nothing is dropped
  return by_min_p == by_min_p ? std::max(cutoff, by_min_p) : -kInf;
}

}  // namespace
