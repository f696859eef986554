// plan_pass and commit_pass on CPU. The reference says what is computed; here segments wait in a heap, so that only
// those that are taken are looked at.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <queue>
#include <tuple>
#include <vector>

namespace {

constexpr int32_t kUnits = 1 << 20, kLowest = -(1 << 30);  // log chances are whole numbers of units

// A log chance in units: reference/passes.py.
int32_t log_units(float log_chance) {
  if (!(log_chance >= float(kLowest) / kUnits)) return kLowest;
  return int32_t(std::floor(std::min(log_chance, 0.f) * kUnits));
}

// x + y for slots that nobody has looked at: they wrap.
int64_t plus(int64_t x, uint64_t y) { return int64_t(uint64_t(x) + y); }

// The slots from a row's self position `begin` up to the next one; `log_sum` is the chance that they turn out final.
struct Segment {
  int32_t log_sum;
  int64_t row, begin;
  bool operator<(const Segment& other) const {  // taken later than `other`
    return std::tie(log_sum, other.row, other.begin) < std::tie(other.log_sum, row, begin);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_pass(
    const at::Tensor& final, const at::Tensor& row_starts, const at::Tensor& next_self, const at::Tensor& log_chance,
    int64_t token_budget, const OptionalTensor& least_log_chance) {
  check(final, "final", at::kLong, {kAny});
  check(row_starts, "row_starts", at::kLong, final.sizes());
  check(next_self, "next_self", at::kLong, {kAny});
  check(log_chance, "log_chance", at::kFloat, next_self.sizes());
  TORCH_CHECK_VALUE(
      1 <= token_budget && token_budget < 1LL << 31, "token_budget=", token_budget,
      " is not accepted; pass 1 <= token_budget < 2**31");
  check(least_log_chance, "least_log_chance", at::kFloat, final.sizes());
  const auto finals = final.accessor<int64_t, 1>(), starts = row_starts.accessor<int64_t, 1>();
  const auto nexts = next_self.accessor<int64_t, 1>();
  const auto chances = log_chance.accessor<float, 1>();
  const int64_t rows = final.size(0), num_slots = next_self.size(0);
  // The next self position, or the slot itself if there is none, or if one of the two is no slot.
  const auto next = [&](int64_t slot) {
    const int64_t after = slot >= 0 && slot < num_slots ? nexts[slot] : slot;
    return after > slot && after < num_slots ? after : slot;
  };

  // Log of the least chance of a segment that is taken. What is no such log stands for a chance of 1.
  std::vector<int32_t> least(rows, kLowest);
  if (least_log_chance) {
    const auto given = least_log_chance->accessor<float, 1>();
    for (int64_t row = 0; row < rows; ++row) least[row] = given[row] <= 0 ? log_units(given[row]) : 0;
  }

  std::vector<int64_t> ends(rows);
  std::priority_queue<Segment> segments;
  int64_t left = token_budget;
  // Takes what the budget allows of the segment from `begin`, and offers the one after it.
  const auto take = [&](int64_t row, int64_t begin, int32_t log_sum) {
    const int64_t size = std::min(next(begin) - begin, left), end = begin + size;
    left -= size;
    ends[row] = end;
    if (left == 0 || next(end) == end) return;
    const int32_t longer = std::max(kLowest, log_sum + log_units(chances[end]));
    if (longer >= least[row]) segments.push({longer, row, end});
  };
  for (int64_t row = 0; row < rows; ++row) take(row, finals[row], 0);
  while (left > 0 && !segments.empty()) {
    const Segment best = segments.top();
    segments.pop();
    take(best.row, best.begin, best.log_sum);
  }

  at::Tensor slots = at::full({token_budget}, -1, final.options());
  at::Tensor cu_seqlens_q = at::zeros({rows + 1}, final.options().dtype(at::kInt));
  at::Tensor kv_ranges = at::empty({rows, 2}, final.options());
  int64_t *slot = slots.data_ptr<int64_t>(), *range = kv_ranges.data_ptr<int64_t>();
  int32_t* bound = cu_seqlens_q.data_ptr<int32_t>();
  int64_t place = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t s = finals[row]; s < ends[row]; ++s) slot[place++] = s;
    bound[row + 1] = int32_t(place);
    range[2 * row] = starts[row];
    range[2 * row + 1] = plus(ends[row], -uint64_t(starts[row]));
  }
  return {slots, cu_seqlens_q, kv_ranges};
}

std::tuple<at::Tensor, at::Tensor> commit_pass(
    at::Tensor& tokens, at::Tensor& final, const at::Tensor& slots, const at::Tensor& cu_seqlens_q,
    const at::Tensor& next_self, const at::Tensor& sampled) {
  check(tokens, "tokens", at::kLong, {kAny});
  check(final, "final", at::kLong, {kAny});
  check(slots, "slots", at::kLong, {kAny});
  check(cu_seqlens_q, "cu_seqlens_q", at::kInt, {final.size(0) + 1});
  check(next_self, "next_self", at::kLong, tokens.sizes());
  check(sampled, "sampled", at::kLong, slots.sizes());
  auto guess = tokens.accessor<int64_t, 1>(), finals = final.accessor<int64_t, 1>();
  const auto slot = slots.accessor<int64_t, 1>(), nexts = next_self.accessor<int64_t, 1>();
  const auto drawn = sampled.accessor<int64_t, 1>();
  const auto bound = cu_seqlens_q.accessor<int32_t, 1>();
  const int64_t last_slot = tokens.size(0) - 1;
  at::Tensor changed = at::zeros(slots.sizes(), slots.options().dtype(at::kBool)), observed = at::zeros_like(changed);
  bool *is_changed = changed.data_ptr<bool>(), *is_observed = observed.data_ptr<bool>();

  for (int64_t row = 0; row < final.size(0); ++row) {
    const int64_t begin = std::max(bound[row], 0), end = std::min<int64_t>(bound[row + 1], slots.size(0));
    if (begin >= end) continue;
    int64_t new_final = plus(slot[end - 1], 1);
    bool right_so_far = true;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = slot[i];
      if (s < 0 || s >= last_slot || nexts[s] != s + 1) continue;
      is_changed[i] = drawn[i] != guess[s + 1];
      is_observed[i] = right_so_far;
      guess[s + 1] = drawn[i];
      if (is_changed[i] && right_so_far) new_final = s + 1;
      right_so_far = right_so_far && !is_changed[i];
    }
    finals[row] = new_final;
  }
  return {changed, observed};
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) {
  m.impl("plan_pass", plan_pass);
  m.impl("commit_pass", commit_pass);
}
