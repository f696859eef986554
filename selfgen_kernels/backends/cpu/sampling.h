// A row of logits that is in memory, or what of it can matter: its filters, and its token.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "draw.h"
#include "filters.h"
#include "groups.h"
#include "row.h"

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t kInvalid = -1, kOpen = -2;  // in place of a token

// The token of a row, kInvalid, or kOpen if what is kept of it does not tell its cutoff. Scratch: the maxima of its
// groups, then room for as many and 64 more.
template <typename AnyRow>
int64_t sample_row(const AnyRow& logits, const Row& row, float* scratch) {
  const int64_t groups = logits.groups();
  const float* maxima = scratch;
  float* const noise = scratch + groups;
  const float peak = *std::max_element(maxima, maxima + groups);
  if (!(-kInf < peak && peak < kInf)) return kInvalid;
  const float cutoff = filter_cutoff(logits, row.filters, maxima, peak, noise);
  if (cutoff != cutoff) return kOpen;

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

// The tokens `drawn` from the logits of `count` rows; logits_of(i) is the LogitsRow or the KeptRow of rows[i].
template <typename F>
void sample_rows(F logits_of, int64_t vocab_size, const Row* rows, int64_t count, int64_t* drawn) {
  const int64_t groups = groups_of(vocab_size), threads = at::get_num_threads();
  const int64_t per_thread = 2 * groups + kGroup;
  const bool few = count < threads;  // then threads share the rows
  at::Tensor scratch = at::empty({few ? 1 : threads, per_thread}, at::kFloat);
  const auto sample = [&](int64_t i, float* own, auto sweep) {
    const auto row = logits_of(i);
    sweep([&](int64_t begin, int64_t end) { row.maxima(begin, end, own); });
    drawn[i] = sample_row(row, rows[i], own);
  };
  float* const data = scratch.data_ptr<float>();
  if (few) {
    for (int64_t i = 0; i < count; ++i) {
      sample(i, data, [&](auto maxima) { at::parallel_for(0, groups, 256, maxima); });
    }
  } else {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      float* const own = data + at::get_thread_num() * per_thread;
      for (int64_t i = begin; i < end; ++i) sample(i, own, [&](auto maxima) { maxima(0, groups); });
    });
  }
}

}  // namespace
