// A row of logits that is in memory: its filters, and its token.

#pragma once

#include "draw.h"
#include "filters.h"
#include "groups.h"
#include "rows.h"

#include <algorithm>
#include <cstdint>

namespace {

// Numbers of scratch memory for `sample_row`.
inline int64_t sample_row_scratch(int64_t vocab_size, bool filtered) {
  return 2 * (groups_of(vocab_size) + kGroup) + (filtered ? vocab_size + kGroup : 0);
}

// The token of a row, or -1 if it is invalid; scratch begins with the maxima of its groups.
template <typename T>
int64_t sample_row(const LogitsRow<T>& logits, const Row& row, float* scratch) {
  const int64_t groups = logits.groups();
  const float* maxima = scratch;
  float *noise = scratch + groups, *values = noise + groups + kGroup;
  const float peak = *std::max_element(maxima, maxima + groups);
  if (!(-kInf < peak && peak < kInf)) return -1;
  const float cutoff = filter_cutoff(logits, row.filters, maxima, peak, values);

  // Every group's score is at least its maximum plus noise. Few have a chance against the best of these.
  float best = -kInf;
  for (int64_t start = 0; start < groups; start += kGroup) {
    const int64_t end = std::min(start + kGroup, groups);
    if (row.greedy) {
      std::fill(noise + start, noise + end, 0.f);
    } else {
      gumbel64(row.key, kGroupNoise, uint32_t(start), noise + start);
    }
    for (int64_t group = start; group < end; ++group) {
      const float score = maxima[group] + noise[group];
      best = maxima[group] >= cutoff && score > best ? score : best;
    }
  }
  Draw draw(row, 0, groups * kGroup);
  float z[kGroup];
  for (int64_t group = 0; group < groups; ++group) {
    if (maxima[group] < cutoff || score_bound(row, maxima[group], noise[group]) < best) continue;
    draw.feed(group, z, logits.load(group, cutoff, z), noise[group]);
  }
  return draw.candidate(1).token;
}

}  // namespace
