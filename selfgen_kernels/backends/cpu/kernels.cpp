// The ops of ../reference on CPU, one row a task. The reference says what is computed; here is only how.
//
// Hot loops run over 64 numbers (a vocabulary group, or the noise of 64 groups) in a form that compilers vectorise, and
// are compiled for several x86 levels of which the loader picks the machine's. No floating-point flag that could change
// a result is set, and fused multiply-adds are off, so every level gives the same bits.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "elementary.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

namespace {

constexpr int64_t kGroup = 64;   // vocabulary ids a group
constexpr int64_t kLanes = 16;   // Philox counters at a time: 4 numbers each, so 64 numbers
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLogGroup = 4.16f;  // a bound on log(64) = 4.1589 that no rounding of a sum of 64 terms exceeds

enum Stream : uint32_t { kMask = 0, kGroupNoise = 1, kTokenNoise = 2 };

// What a row's random numbers depend on.
struct RowKey {
  RowKey(int64_t seed, int64_t sample_id, int64_t position)
      : k0(uint32_t(seed)), k1(uint32_t(uint64_t(seed) >> 32)), c1(uint32_t(position)), c2(uint32_t(sample_id)),
        c3(uint32_t(uint64_t(sample_id) >> 32)) {}
  uint32_t k0, k1, c1, c2, c3;
};

// ---- Loops over 64 numbers -------------------------------------------------------------------------------------------

SELFGEN_INLINE float gumbel(uint32_t word) {
  const float scaled = (float(word) + 0.5f) * 0x1p-32f;
  const float w = scaled < 1 - 0x1p-24f ? scaled : 1 - 0x1p-24f;
  const float u = 1 - w;
  const float log1p = log_(u) * (w / (u == 1 ? 1 : 1 - u));  // log1p(-w): u's rounding cancels in the quotient
  const float exponential = u == 1 ? w : -log1p;
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
SELFGEN_CLONES void gumbel64(const RowKey& key, uint32_t stream, uint32_t first, float noise[kGroup]) {
  uint32_t words[4][kLanes];
  philox<kLanes>(key, stream, first / 4, words);
  for (int64_t j = 0; j < 4; ++j) {
    for (int64_t i = 0; i < kLanes; ++i) noise[4 * i + j] = gumbel(words[j][i]);
  }
}

// z of one group, and its maximum: scaled, filtered, -inf past the end of the row, +inf in place of NaN.
template <typename T>
SELFGEN_INLINE float load_group_(const T* logits, int64_t size, float scale, float cutoff, float z[kGroup]) {
  float largest[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) largest[i] = -kInf;
  if (size < kGroup) {
    for (int64_t i = 0; i < kGroup; ++i) z[i] = i < size ? float(logits[i]) : -kInf;
  } else {
    for (int64_t i = 0; i < kGroup; ++i) z[i] = float(logits[i]);
  }
  for (int64_t j = 0; j < kGroup; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      float x = z[j + i] * scale;
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

SELFGEN_CLONES float load_group(const float* logits, int64_t size, float scale, float cutoff, float z[kGroup]) {
  return load_group_(logits, size, scale, cutoff, z);
}
SELFGEN_CLONES float load_group(const at::BFloat16* logits, int64_t size, float scale, float cutoff, float z[kGroup]) {
  return load_group_(logits, size, scale, cutoff, z);
}
SELFGEN_CLONES float load_group(const at::Half* logits, int64_t size, float scale, float cutoff, float z[kGroup]) {
  return load_group_(logits, size, scale, cutoff, z);
}

// logsumexp of a group whose maximum is finite.
SELFGEN_CLONES float logsumexp(const float z[kGroup], float largest) {
  float sum[kLanes] = {};
  for (int64_t j = 0; j < kGroup; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) sum[i] += exp_(z[j + i] - largest);
  }
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += sum[i];
  return largest + log_(total);
}

// ---- Rows ------------------------------------------------------------------------------------------------------------

bool in_mask(const RowKey& key, int64_t threshold) {
  uint32_t words[4][1];
  philox<1>(key, kMask, 0, words);
  return int64_t(words[0][0]) < threshold;
}

// The token drawn from a row of logits, or -1 if the row is invalid. inv_temperature = +inf is greedy.
template <typename T>
int64_t draw(const T* logits, int64_t vocab_size, const RowKey& key, float inv_temperature, float cutoff) {
  const bool greedy = inv_temperature == kInf;
  const float scale = greedy ? 1 : inv_temperature;
  const auto load = [&](int64_t group, float* z) {
    const int64_t start = group * kGroup;
    return load_group(logits + start, std::min(kGroup, vocab_size - start), scale, cutoff, z);
  };

  float z[kGroup], noise[kGroup] = {};
  float best = -kInf;
  int64_t best_group = -1;
  for (int64_t group = 0; group * kGroup < vocab_size; ++group) {
    if (!greedy && group % kGroup == 0) gumbel64(key, kGroupNoise, group, noise);
    const float largest = load(group, z);
    if (largest == kInf) return -1;
    const float group_noise = noise[group % kGroup];
    // Rounding is monotonic: a group that does not win with the largest possible logsumexp does not win with its own.
    if (largest + (greedy ? 0 : kLogGroup) + group_noise <= best || largest == -kInf) continue;
    const float score = greedy ? largest : logsumexp(z, largest) + group_noise;
    if (score > best) {
      best = score;
      best_group = group;
    }
  }
  if (best_group < 0) return -1;

  load(best_group, z);
  if (!greedy) gumbel64(key, kTokenNoise, 0, noise);
  int64_t best_offset = 0;
  for (int64_t i = 1; i < kGroup; ++i) {
    if (z[i] + noise[i] > z[best_offset] + noise[best_offset]) best_offset = i;
  }
  return best_group * kGroup + best_offset;
}

// ---- Ops: their contract is in ops/noise.py and ops/sampling.py ------------------------------------------------------

at::Tensor gumbel_noise(
    int64_t seed, const at::Tensor& sample_ids, const at::Tensor& positions, int64_t size, int64_t stream) {
  const at::Tensor ids = sample_ids.to(at::kLong).contiguous(), at_positions = positions.to(at::kLong).contiguous();
  at::Tensor out = at::empty({ids.size(0), size}, ids.options().dtype(at::kFloat));
  const int64_t *id = ids.const_data_ptr<int64_t>(), *position = at_positions.const_data_ptr<int64_t>();
  float* result = out.data_ptr<float>();
  at::parallel_for(0, ids.size(0), 1 + 4096 / (1 + size), [&](int64_t begin, int64_t end) {
    float noise[kGroup];
    for (int64_t row = begin; row < end; ++row) {
      const RowKey key(seed, id[row], position[row]);
      for (int64_t start = 0; start < size; start += kGroup) {
        gumbel64(key, uint32_t(stream), uint32_t(start), noise);
        std::memcpy(result + row * size + start, noise, std::min(kGroup, size - start) * sizeof(float));
      }
    }
  });
  return out;
}

at::Tensor self_mask(
    int64_t seed, const at::Tensor& sample_ids, const at::Tensor& positions, const at::Tensor& threshold) {
  const at::Tensor ids = sample_ids.to(at::kLong).contiguous(), at_positions = positions.to(at::kLong).contiguous();
  const at::Tensor thresholds = threshold.contiguous();
  at::Tensor out = at::empty({ids.size(0)}, ids.options().dtype(at::kBool));
  const int64_t *id = ids.const_data_ptr<int64_t>(), *position = at_positions.const_data_ptr<int64_t>();
  const int64_t* below = thresholds.const_data_ptr<int64_t>();
  bool* result = out.data_ptr<bool>();
  at::parallel_for(0, ids.size(0), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      result[row] = in_mask(RowKey(seed, id[row], position[row]), below[row]);
    }
  });
  return out;
}

using OptionalTensor = std::optional<at::Tensor>;

// The cutoff of the filters for each of `rows` [S], from the one implementation of the filters (reference/scaling.py).
at::Tensor filter_cutoff(
    const at::Tensor& logits, const at::Tensor& inv_temperature, const at::Tensor& rows, const OptionalTensor& top_k,
    const OptionalTensor& top_p, const OptionalTensor& min_p) {
  using Signature = at::Tensor(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("selfgen::_filter_cutoff", "").typed<Signature>();
  const auto take = [&](const OptionalTensor& value) {
    return value ? OptionalTensor(value->index_select(0, rows)) : OptionalTensor();
  };
  return op.call(
      logits.index_select(0, rows), inv_temperature.index_select(0, rows), take(top_k), take(top_p), take(min_p));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_mix(
    const at::Tensor& logits, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed,
    const at::Tensor& sample_ids, const at::Tensor& positions, const at::Tensor& inv_temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p) {
  const at::Tensor is_self = self_mask(seed, sample_ids, positions, threshold);
  const at::Tensor rows = is_self.nonzero().squeeze(1);  // [S]
  at::Tensor tokens = reference.clone(at::MemoryFormat::Contiguous), invalid = at::zeros_like(is_self);

  const bool filtered = top_k || top_p || min_p;
  const at::Tensor cutoffs = filtered
      ? filter_cutoff(logits, inv_temperature, rows, top_k, top_p, min_p).contiguous()
      : at::full(rows.sizes(), -kInf, inv_temperature.options());  // [S]

  const at::Tensor ids = sample_ids.to(at::kLong).contiguous(), at_positions = positions.to(at::kLong).contiguous();
  const at::Tensor inverses = inv_temperature.contiguous();
  const at::Tensor dense = logits.stride(1) == 1 ? logits : logits.contiguous();
  const int64_t *id = ids.const_data_ptr<int64_t>(), *position = at_positions.const_data_ptr<int64_t>();
  const int64_t* row_of = rows.const_data_ptr<int64_t>();
  const float *inverse = inverses.const_data_ptr<float>(), *cutoff = cutoffs.const_data_ptr<float>();
  int64_t* token = tokens.data_ptr<int64_t>();
  bool* is_invalid = invalid.data_ptr<bool>();

  const auto run = [&](const auto* data) {
    at::parallel_for(0, rows.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = row_of[i];
        const RowKey key(seed, id[row], position[row]);
        const int64_t drawn = draw(data + row * dense.stride(0), dense.size(1), key, inverse[row], cutoff[i]);
        is_invalid[row] = drawn < 0;
        if (drawn >= 0) token[row] = drawn;
      }
    });
  };
  switch (dense.scalar_type()) {
    case at::kFloat: run(dense.const_data_ptr<float>()); break;
    case at::kBFloat16: run(dense.const_data_ptr<at::BFloat16>()); break;
    case at::kHalf: run(dense.const_data_ptr<at::Half>()); break;
    default: TORCH_CHECK_TYPE(false, "logits must be float32, bfloat16 or float16, got ", dense.scalar_type());
  }
  return {tokens, is_self, invalid};
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) {
  m.impl("gumbel_noise", gumbel_noise);
  m.impl("self_mask", self_mask);
  m.impl("sample_mix", sample_mix);
}
