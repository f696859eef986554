// The rows of a call that the mask selects, and how each of them is drawn.

#pragma once

#include <ATen/ATen.h>

#include "checks.h"
#include "random.h"
#include "row.h"

#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using Mixed = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // tokens, is_self, invalid: [N] each

// The arguments that the sampling ops share, for `count` rows and in the order of their schema.
struct Rows {
  Rows(
      int64_t count, const at::Tensor& threshold, int64_t seed, const at::Tensor& sample_ids,
      const at::Tensor& positions, const at::Tensor& inv_temperature, const OptionalTensor& top_k,
      const OptionalTensor& top_p, const OptionalTensor& min_p)
      : is_self(at::empty({count}, threshold.options().dtype(at::kBool))) {
    check(threshold, "threshold", at::kLong, {count});
    check_keys(sample_ids, positions, count);
    check(inv_temperature, "inv_temperature", at::kFloat, {count});
    check(top_k, "top_k", at::kLong, {count});
    check(top_p, "top_p", at::kDouble, {count});
    check(min_p, "min_p", at::kDouble, {count});
    const at::Tensor ids = sample_ids.to(at::kLong).contiguous(), places = positions.to(at::kLong).contiguous();
    const at::Tensor thresholds = threshold.contiguous(), inverses = inv_temperature.contiguous();
    const at::Tensor k = top_k ? top_k->contiguous() : at::Tensor(), p = top_p ? top_p->contiguous() : at::Tensor();
    const at::Tensor m = min_p ? min_p->contiguous() : at::Tensor();
    const int64_t *id = ids.const_data_ptr<int64_t>(), *place = places.const_data_ptr<int64_t>();
    const int64_t* below = thresholds.const_data_ptr<int64_t>();
    const float* inverse = inverses.const_data_ptr<float>();
    bool* self = is_self.data_ptr<bool>();
    for (int64_t i = 0; i < count; ++i) {
      const RowKey key(seed, id[i], place[i]);
      self[i] = in_mask(key, below[i]);
      if (!self[i]) continue;
      const bool greedy = inverse[i] == kInf;
      Filters filters;
      if (top_k && !greedy) filters.top_k = k.const_data_ptr<int64_t>()[i];
      if (top_p && !greedy) filters.top_p = p.const_data_ptr<double>()[i];
      if (min_p && !greedy) filters.log_min_p = float(std::log(m.const_data_ptr<double>()[i]));
      selected.push_back({i, key, greedy, greedy ? 1 : inverse[i], filters});
    }
  }
  at::Tensor is_self;  // bool [N]
  std::vector<Row> selected;
};

// `reference` where the mask did not select, the token drawn where it did; an invalid row was drawn as -1.
inline Mixed mix(const at::Tensor& reference, const Rows& rows, const std::vector<int64_t>& drawn) {
  at::Tensor tokens = reference.clone(at::MemoryFormat::Contiguous), invalid = at::zeros_like(rows.is_self);
  int64_t* token = tokens.data_ptr<int64_t>();
  bool* is_invalid = invalid.data_ptr<bool>();
  for (size_t i = 0; i < drawn.size(); ++i) {
    const int64_t index = rows.selected[i].index;
    is_invalid[index] = drawn[i] < 0;
    if (drawn[i] >= 0) token[index] = drawn[i];
  }
  return {tokens, rows.is_self, invalid};
}

}  // namespace
