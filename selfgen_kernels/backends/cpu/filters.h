// The cutoff of top-k, top-p and min-p, as reference/scaling.py defines it, without sorting a row.
//
// The maxima of the groups, known beforehand, bound the cutoff from below, so only what lies above the bound is looked
// at: for top-k the k-th largest maximum, for top-p the value below which all V tokens together have less than 1 - p.
// Among these few candidates both filters ask for the same: the smallest value with less than a target of weight above
// it, a weight being 1 or a probability. They are put into bins, of which only the critical one is looked at again.

#pragma once

#include "groups.h"
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

namespace {

constexpr int64_t kBins = 1024;
constexpr int64_t kFewValues = 64;  // are sorted

// Appends those of z that are at least `bound`, and returns the new end.
SELFGEN_INLINE float* append(const float z[kGroup], float bound, float* end) {
  for (int64_t i = 0; i < kGroup; ++i) {
    *end = z[i];
    end += z[i] >= bound;
  }
  return end;
}

// The probabilities of 64 values, relative to the peak's.
SELFGEN_CLONES void exp64(const float values[kGroup], float peak, float weights[kGroup]) {
  for (int64_t i = 0; i < kGroup; ++i) weights[i] = exp_(values[i] - peak);
}

// The bins of 64 values that are at most `largest`, the largest values first.
SELFGEN_CLONES void bin64(const float values[kGroup], float largest, float bins_per_unit, int32_t bins[kGroup]) {
  for (int64_t i = 0; i < kGroup; ++i) {
    const float bin = (largest - values[i]) * bins_per_unit;
    bins[i] = int32_t(bin < kBins - 1 ? bin : kBins - 1);
  }
}

// Finite values, each with a weight: its probability relative to the peak's, or 1.
struct Weighted {
  int64_t size() const { return end - begin; }

  // Calls f(value, weight, bin) for all values in turn; the bins have no meaning if bins_per_unit is 0.
  template <typename F>
  void for_each(float largest, float bins_per_unit, F f) const {
    float values[kGroup], weights[kGroup];
    int32_t bins[kGroup];
    std::fill_n(weights, kGroup, 1.f);
    for (const float* at = begin; at < end; at += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, end - at);
      std::fill(std::copy_n(at, count, values), values + kGroup, largest);
      if (by_mass) exp64(values, peak, weights);
      bin64(values, largest, bins_per_unit, bins);
      for (int64_t i = 0; i < count; ++i) f(values[i], weights[i], bins[i]);
    }
  }

  double total() const {
    double sum = 0;
    for_each(peak, 0, [&](float, float weight, int32_t) { sum += weight; });
    return sum;
  }

  float *begin, *end;
  bool by_mass;
  float peak;
};

// The smallest value of `all` with less than `target` of weight above it, or the largest if there is none. Overwrites.
inline float smallest_kept(Weighted all, double target) {
  double above = 0;  // weight of the values that are known to be larger than what is sought
  while (all.size() > kFewValues) {
    const auto [smallest, largest] = std::minmax_element(all.begin, all.end);
    const float low = *smallest, high = *largest, bins_per_unit = (kBins - 1) / (high - low);
    if (low == high) return low;
    if (!(bins_per_unit > 0 && bins_per_unit < kInf)) break;  // the range overflows, or is too narrow to divide

    double weight_of[kBins] = {};
    all.for_each(high, bins_per_unit, [&](float, float weight, int32_t bin) { weight_of[bin] += weight; });
    int32_t critical = 0;  // the bin with which the target is reached, or the last that is not empty
    double sum = above;
    for (int32_t bin = 0; bin < kBins && (bin == 0 || sum < target); ++bin) {
      if (weight_of[bin] == 0) continue;
      critical = bin;
      above = sum;
      sum += weight_of[bin];
    }
    float* kept = all.begin;  // the values are written behind where they are read
    all.for_each(high, bins_per_unit, [&](float value, float, int32_t bin) {
      *kept = value;
      kept += bin == critical;
    });
    all.end = kept;
  }
  std::sort(all.begin, all.end, std::greater<float>());
  float kept = *all.begin;
  all.for_each(kept, 0, [&](float value, float weight, int32_t) {
    if (above < target) kept = value;
    above += weight;
  });
  return kept;
}

// Whether the cutoff is more than a distance from the peak.
inline bool looks_at_values(const Filters& filters) {
  return filters.top_k < std::numeric_limits<int64_t>::max() || filters.top_p < 1;
}

// The cutoff of one row, whose largest maximum `peak` is finite. `values`: room for V + 64 numbers if
// looks_at_values().
template <typename T>
float filter_cutoff(
    const LogitsRow<T>& row, const Filters& filters, const float* maxima, float peak, float* values) {
  const int64_t groups = row.groups(), k = std::max<int64_t>(1, filters.top_k);
  const bool by_k = k < row.vocab_size, by_p = filters.top_p < 1;
  float z[kGroup], cutoff = -kInf;
  if (by_k || by_p) {
    float bound = std::numeric_limits<float>::lowest();
    double p_mass = 0;
    const double p = std::max(0., filters.top_p);
    if (by_k && k <= groups) {
      std::copy_n(maxima, groups, values);
      std::nth_element(values, values + k - 1, values + groups, std::greater<float>());
      bound = std::max(bound, values[k - 1]);
    }
    if (!by_k) {
      double mass = 0;
      for (int64_t group = 0; group < groups; ++group) {
        row.load(group, -kInf, z);
        mass += sum_exp(z, peak);
      }
      p_mass = p * mass;
      const double margin = 0.01;  // more than all rounding of the masses
      const double below = std::log((1 - p) * mass / double(row.vocab_size)) - margin;
      bound = std::max(bound, std::nextafter(float(peak + below), -kInf));
    }

    Weighted kept{values, values, false, peak};
    const auto collect = [&](float least) {
      kept.end = values;
      for (int64_t group = 0; group < groups; ++group) {
        if (maxima[group] < least) continue;
        row.load(group, -kInf, z);
        kept.end = append(z, least, kept.end);
      }
    };
    collect(bound);
    if (by_k && kept.size() >= k) {
      cutoff = smallest_kept(kept, double(k));
      if (by_p) collect(cutoff);  // the search leaves only some of the values
    }
    if (by_p) {
      kept.by_mass = true;
      cutoff = std::max(cutoff, smallest_kept(kept, by_k ? p * kept.total() : p_mass));
    }
  }
  const float by_min_p = peak + filters.log_min_p;  // NaN for a min_p that no one could accept: nothing is dropped
  return by_min_p == by_min_p ? std::max(cutoff, by_min_p) : -kInf;
}

}  // namespace
