// The generator of ../reference/philox.py: 64 numbers at a time, in a form that compilers vectorise.

#pragma once

#include "elementary.h"

#include <cstdint>

namespace {

constexpr int64_t kGroup = 64;  // vocabulary ids per group, and random numbers at a time
constexpr int64_t kLanes = 16;  // Philox counters at a time: 4 numbers each, so 64 numbers

enum Stream : uint32_t { kMask = 0, kGroupNoise = 1, kTokenNoise = 2 };

// What a row's random numbers depend on.
struct RowKey {
  RowKey(int64_t seed, int64_t sample_id, int64_t position)
      : k0(uint32_t(seed)), k1(uint32_t(uint64_t(seed) >> 32)), c1(uint32_t(position)), c2(uint32_t(sample_id)),
        c3(uint32_t(uint64_t(sample_id) >> 32)) {}
  uint32_t k0, k1, c1, c2, c3;
};

SELFGEN_INLINE float gumbel(uint32_t word) {
  const float scaled = (float(word) + 0.5f) * 0x1p-32f;
  const float w = scaled < 1 - 0x1p-24f ? scaled : 1 - 0x1p-24f;
  const Split split(1 - w);
  const float exponential = -log_of(split.k == 0 ? -w : split.f, split.k);  // -log(1 - w), for any small w
  return -log_(exponential);
}

// Ten rounds of Philox4x32 on the counters first, .., first + LANES - 1 of a stream; words[j] holds each one's word j.
template <int64_t LANES>
SELFGEN_INLINE void philox(const RowKey& key, uint32_t stream, uint32_t first, uint32_t words[4][LANES]) {
  for (int64_t i = 0; i < LANES; ++i) {
    words[0][i] = (stream << 28) | (first + uint32_t(i));
    words[1][i] = key.c1;
    words[2][i] = key.c2;
    words[3][i] = key.c3;
  }
  uint32_t k0 = key.k0, k1 = key.k1;
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int64_t i = 0; i < LANES; ++i) {
      const uint64_t product0 = uint64_t(0xD2511F53u) * words[0][i], product1 = uint64_t(0xCD9E8D57u) * words[2][i];
      words[0][i] = uint32_t(product1 >> 32) ^ words[1][i] ^ k0;
      words[1][i] = uint32_t(product1);
      words[2][i] = uint32_t(product0 >> 32) ^ words[3][i] ^ k1;
      words[3][i] = uint32_t(product0);
    }
  }
}

// Gumbel noise of the indices first, .., first + 63; first is a multiple of 4.
SELFGEN_INLINE void gumbel64_(const RowKey& key, uint32_t stream, uint32_t first, float noise[kGroup]) {
  uint32_t words[4][kLanes];
  philox<kLanes>(key, stream, first / 4, words);
  for (int64_t j = 0; j < 4; ++j) {
    for (int64_t i = 0; i < kLanes; ++i) noise[4 * i + j] = gumbel(words[j][i]);
  }
}
SELFGEN_CLONES(
    void, gumbel64, (const RowKey& key, uint32_t stream, uint32_t first, float noise[kGroup]),
    (key, stream, first, noise))

// Whether the mask selects the row.
inline bool in_mask(const RowKey& key, int64_t threshold) {
  uint32_t words[4][1];
  philox<1>(key, kMask, 0, words);
  return int64_t(words[0][0]) < threshold;
}

}  // namespace
