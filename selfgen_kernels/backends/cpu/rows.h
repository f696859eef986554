// The rows of a sampling call: what an op is told of them, how each that the mask selects is drawn, what comes of it.

#pragma once

#include <ATen/ATen.h>

#include "checks.h"
#include "groups.h"
#include "random.h"
#include "row.h"

#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using Mixed = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // tokens, is_self, invalid: [N] each

// What a sampling op is told of its N rows: the last arguments of its schema, in this order.
struct Sampling {
  OptionalTensor reference;                           // int64 [N]; none for a shard, which mixes nothing
  at::Tensor threshold;                               // int64 [N]
  int64_t seed;
  at::Tensor sample_ids, positions;                   // int64 or int32 [N]
  OptionalTensor inv_temperature = {};                // fp32 [N]; none: 1
  OptionalTensor top_k = {}, top_p = {}, min_p = {};  // int64, fp64 and fp64 [N]; none: no such filter
};

// Ops get their arguments one by one. SamplingOp<Own...>::mix<f> and ::log_prob<f> are the ops of f(own, sampling): Own
// are the types of the arguments that come before those of a Sampling.
template <typename... Own>
struct SamplingOp {
  template <auto f>
  static Mixed mix(
      Own... own, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed, const at::Tensor& sample_ids,
      const at::Tensor& positions, const at::Tensor& inv_temperature, const OptionalTensor& top_k,
      const OptionalTensor& top_p, const OptionalTensor& min_p) {
    return f({own...}, {reference, threshold, seed, sample_ids, positions, inv_temperature, top_k, top_p, min_p});
  }

  template <auto f>
  static at::Tensor log_prob(
      Own... own, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed, const at::Tensor& sample_ids,
      const at::Tensor& positions) {
    return f({own...}, {reference, threshold, seed, sample_ids, positions});
  }
};

// The rows of a call, checked. `selected` are those that the mask selects.
struct Rows {
  Rows(int64_t count, const Sampling& sampling)
      : is_self(at::empty({count}, sampling.threshold.options().dtype(at::kBool))) {
    check(sampling.reference, "reference", at::kLong, {count});
    check(sampling.threshold, "threshold", at::kLong, {count});
    check_keys(sampling.sample_ids, sampling.positions, count);
    check(sampling.inv_temperature, "inv_temperature", at::kFloat, {count});
    check(sampling.top_k, "top_k", at::kLong, {count});
    check(sampling.top_p, "top_p", at::kDouble, {count});
    check(sampling.min_p, "min_p", at::kDouble, {count});
    const auto dense = [](const OptionalTensor& x) { return x ? x->contiguous() : at::Tensor(); };
    reference = dense(sampling.reference);
    const at::Tensor ids = sampling.sample_ids.to(at::kLong).contiguous();
    const at::Tensor places = sampling.positions.to(at::kLong).contiguous();
    const at::Tensor thresholds = dense(sampling.threshold), inverses = dense(sampling.inv_temperature);
    const at::Tensor k = dense(sampling.top_k), p = dense(sampling.top_p), m = dense(sampling.min_p);
    const int64_t *id = ids.const_data_ptr<int64_t>(), *place = places.const_data_ptr<int64_t>();
    const int64_t* below = thresholds.const_data_ptr<int64_t>();
    const float* inverse = sampling.inv_temperature ? inverses.const_data_ptr<float>() : nullptr;
    bool* self = is_self.data_ptr<bool>();
    for (int64_t i = 0; i < count; ++i) {
      const RowKey key(sampling.seed, id[i], place[i]);
      self[i] = in_mask(key, below[i]);
      if (!self[i]) continue;
      const bool greedy = inverse && inverse[i] == kInf;
      Filters filters;
      if (sampling.top_k && !greedy) filters.top_k = k.const_data_ptr<int64_t>()[i];
      if (sampling.top_p && !greedy) filters.top_p = p.const_data_ptr<double>()[i];
      if (sampling.min_p && !greedy) filters.log_min_p = log_of_share(m.const_data_ptr<double>()[i]);
      selected.push_back({i, key, greedy, greedy || !inverse ? 1 : inverse[i], filters});
    }
  }
  at::Tensor reference;  // int64 [N], dense; undefined if there is none
  at::Tensor is_self;    // bool [N]
  std::vector<Row> selected;
};

// The reference where the mask did not select, the token drawn where it did; an invalid row was drawn as -1.
inline Mixed mix(const Rows& rows, const std::vector<int64_t>& drawn) {
  at::Tensor tokens = rows.reference.clone(at::MemoryFormat::Contiguous), invalid = at::zeros_like(rows.is_self);
  int64_t* token = tokens.data_ptr<int64_t>();
  bool* is_invalid = invalid.data_ptr<bool>();
  for (size_t i = 0; i < drawn.size(); ++i) {
    const int64_t index = rows.selected[i].index;
    is_invalid[index] = drawn[i] < 0;
    if (drawn[i] >= 0) token[index] = drawn[i];
  }
  return {tokens, rows.is_self, invalid};
}

// 0 where the mask did not select, the log probability of the reference where it did. Per selected row: z is the logit
// of the reference, -inf if the vocabulary lacks it, and `groups` of the peaks and masses are the row's.
inline at::Tensor log_probs(
    const Rows& rows, const std::vector<float>& z, const std::vector<float>& peaks, const std::vector<uint32_t>& masses,
    int64_t groups) {
  at::Tensor result = at::zeros(rows.is_self.sizes(), at::kFloat);
  float* out = result.data_ptr<float>();
  at::parallel_for(0, z.size(), 1 + (1 << 13) / (groups + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[rows.selected[i].index] = log_prob(z[i], peaks.data() + i * groups, masses.data() + i * groups, groups);
    }
  });
  return result;
}

}  // namespace
