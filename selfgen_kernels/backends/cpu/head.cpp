// linear_sample_mix, linear_sample_shard and linear_reference_log_prob on CPU; their contract is in ops/head.py.
//
// The vocabulary passes by in groups: the product of one group's head with all rows (head_rows.h), then each row's draw
// takes the group in. Without a filter nothing else is kept of the logits. With one, the values that reach a bound of
// the row's cutoff are (kept.h), or, where these do not fit, all logits of a few rows at a time. From what is kept,
// rows are drawn as sample_mix does. Of a probability, what is kept is the mass of each group.

#include <ATen/ATen.h>
#include <torch/library.h>

#include "checks.h"
#include "draw.h"
#include "groups.h"
#include "head_rows.h"
#include "kept.h"
#include "rows.h"
#include "sampling.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <optional>
#include <tuple>
#include <vector>

namespace {

constexpr int64_t kEnough = 64;  // rows for a product that takes as long per row as one of more rows

// z of one group of one row in lane `lane`, and its maximum: the ids from the group's `offset` on are the shard's.
SELFGEN_INLINE float load_lane(
    const float* logits, int64_t lanes, int64_t lane, int64_t offset, int64_t size, float scale, float z[kGroup]) {
  float own[kGroup];
  std::fill_n(own, kGroup, -kInf);
  for (int64_t j = 0; j < size; ++j) own[offset + j] = logits[j * lanes + lane];
  return load_group(own, kGroup, scale, -kInf, z);
}

// How each row is drawn from its part of the vocabulary, from logits that nobody keeps.
template <typename T>
std::vector<Draw> draw_rows(const HeadArguments& arguments, const Row* rows, int64_t count, int64_t end_id) {
  const HeadRows<T> head(arguments, rows, count);
  std::vector<Draw> draws;
  draws.reserve(head.threads() * count);
  for (int64_t thread = 0; thread < head.threads(); ++thread) {
    for (int64_t i = 0; i < count; ++i) draws.emplace_back(rows[i], arguments.first_id, end_id);
  }
  head.for_each_group([&](int64_t thread, int64_t group, int64_t first, int64_t size, const float* logits) {
    const int64_t lanes = head.lanes(), offset = arguments.first_id + first - group * kGroup;
    for (int64_t i = 0; i < count; ++i) {
      Draw& draw = draws[thread * count + i];
      float z[kGroup];
      const float largest = load_lane(logits, lanes, i, offset, size, draw.row().scale, z);
      draw.feed(group, z, largest, draw.noise(group));
    }
    return true;
  });
  for (int64_t thread = 1; thread < head.threads(); ++thread) {
    for (int64_t i = 0; i < count; ++i) draws[i].merge(draws[thread * count + i]);
  }
  draws.erase(draws.begin() + count, draws.end());
  return draws;
}

// Peaks and masses of a group's logits [size, lanes], NaN being +inf: those of the first `count` lanes. Where a peak is not finite, any mass.
SELFGEN_INLINE void lane_masses_(
    const float* logits, int64_t size, int64_t lanes, int64_t count, float* __restrict peak, uint32_t* __restrict mass) {
  std::fill_n(peak, count, -kInf);
  std::fill_n(mass, count, 0);
  for (int64_t j = 0; j < size; ++j) {
    for (int64_t i = 0; i < count; ++i) {
      const float z = logits[j * lanes + i], x = z == z ? z : kInf;
      peak[i] = x > peak[i] ? x : peak[i];
    }
  }
  for (int64_t j = 0; j < size; ++j) {
    for (int64_t i = 0; i < count; ++i) mass[i] += mass_term(exp_(logits[j * lanes + i] - peak[i]));
  }
}
SELFGEN_CLONES(
    void, lane_masses,
    (const float* logits, int64_t size, int64_t lanes, int64_t count, float* __restrict peak,
     uint32_t* __restrict mass),
    (logits, size, lanes, count, peak, mass))

// The log probability of the references. What is kept of the logits is the mass of each group.
template <typename T>
at::Tensor head_log_probs(const HeadArguments& arguments, const Rows& rows) {
  const int64_t groups = groups_of(arguments.weight.size(0)), count = rows.selected.size();
  const HeadRows<T> head(arguments, rows.selected.data(), count);
  std::vector<float> z(count, -kInf), peaks(count * groups), peak(head.threads() * count);
  std::vector<uint32_t> masses(count * groups), mass(head.threads() * count);
  const int64_t* const tokens = rows.reference.const_data_ptr<int64_t>();
  head.for_each_group([&](int64_t thread, int64_t group, int64_t first, int64_t size, const float* logits) {
    float* const own_peak = peak.data() + thread * count;
    uint32_t* const own_mass = mass.data() + thread * count;
    lane_masses(logits, size, head.lanes(), count, own_peak, own_mass);
    for (int64_t i = 0; i < count; ++i) {
      peaks[i * groups + group] = own_peak[i];
      masses[i * groups + group] = own_mass[i];
      const int64_t token = tokens[rows.selected[i].index];
      if (first <= token && token < first + size) z[i] = logits[(token - first) * head.lanes() + i];
    }
    return true;
  });
  return log_probs(rows, z, peaks, masses, groups);
}

// What became of some rows, which are put into this order.
struct Outcome {
  int64_t drawn, gave_up;  // the others are open: see kOpen
};

// The tokens of rows with a filter, from what of their logits can matter, in `bytes` of memory.
template <typename T>
Outcome draw_kept(const HeadArguments& arguments, Row* rows, int64_t count, int64_t bytes, int64_t* drawn) {
  const int64_t vocab_size = arguments.weight.size(0);
  const HeadRows<T> head(arguments, rows, count);
  std::atomic<int64_t> bytes_left = bytes, whole = count;
  std::deque<Keeper> keepers;
  for (int64_t i = 0; i < count; ++i) keepers.emplace_back(rows[i], vocab_size, bytes_left);
  head.for_each_group([&](int64_t, int64_t group, int64_t, int64_t size, const float* logits) {
    for (int64_t i = 0; i < count; ++i) {
      float z[kGroup];
      const float largest = load_lane(logits, head.lanes(), i, 0, size, rows[i].scale, z);
      if (!keepers[i].feed(group, z, largest)) --whole;
    }
    return 4 * whole > count;  // where most rows have given up, the others will, and each group costs as much as before
  });
  if (4 * whole <= count) return {0, count};
  std::vector<Keeper*> kept;
  std::vector<Row> kept_rows, gave_up, open;
  for (int64_t i = 0; i < count; ++i) {
    (keepers[i].is_whole() ? kept_rows : gave_up).push_back(rows[i]);
    if (keepers[i].is_whole()) kept.push_back(&keepers[i]);
  }
  std::vector<int64_t> tokens(kept.size());
  sample_rows([&](int64_t i) { return kept[i]->row(); }, vocab_size, kept_rows.data(), kept.size(), tokens.data());
  Row* next = rows;
  for (size_t i = 0; i < kept.size(); ++i) {
    if (tokens[i] == kOpen) {
      open.push_back(kept_rows[i]);
    } else {
      *drawn++ = tokens[i];
      *next++ = kept_rows[i];
    }
  }
  std::copy(open.begin(), open.end(), std::copy(gave_up.begin(), gave_up.end(), next));
  return {next - rows, int64_t(gave_up.size())};
}

// The same from all logits of `count` rows, as Stored.
template <typename T, typename Stored>
void draw_stored(const HeadArguments& arguments, const Row* rows, int64_t count, Stored* logits, int64_t* drawn) {
  const int64_t vocab_size = arguments.weight.size(0);
  const HeadRows<T> head(arguments, rows, count);
  head.for_each_group([&](int64_t, int64_t, int64_t first, int64_t ids, const float* from) {
    for (int64_t i = 0; i < count; ++i) {
      Stored* to = logits + i * vocab_size + first;
      for (int64_t j = 0; j < ids; ++j) to[j] = Stored(from[j * head.lanes() + i]);
    }
    return true;
  });
  const auto row = [&](int64_t i) {
    return LogitsRow<Stored>{logits + i * vocab_size, vocab_size, rows[i].scale};
  };
  sample_rows(row, vocab_size, rows, count, drawn);
}

// The tokens of rows with a filter, in `bytes` of memory, or what one row of Stored takes: first of those whose few
// values that matter fit, as many rows at a time as turn out to, then of the others. Rows are put into the order in
// which they are drawn.
template <typename T, typename Stored>
void draw_filtered(const HeadArguments& arguments, Row* rows, int64_t count, int64_t bytes, int64_t* drawn) {
  const int64_t vocab_size = arguments.weight.size(0), row_bytes = vocab_size * int64_t(sizeof(Stored));
  const int64_t most = std::clamp<int64_t>(bytes / row_bytes, 1, count);  // that are stored at a time
  const auto can_keep = [&](const Row& row) { return Keeper::can_keep(row.filters, vocab_size, most >= kEnough); };
  int64_t begin = 0, keepable = std::partition(rows, rows + count, can_keep) - rows;
  const int64_t for_values = std::max(bytes, row_bytes) / 2;  // the allocator may not give it back for the rows below
  for (int64_t at_a_time = keepable; begin < keepable;) {
    const int64_t size = std::min(at_a_time, keepable - begin);
    const bool only_open_left = size == keepable - begin;  // if none gives up
    const Outcome outcome = draw_kept<T>(arguments, rows + begin, size, for_values, drawn + begin);
    begin += outcome.drawn;
    at_a_time = size - outcome.gave_up;
    if (outcome.drawn <= most || (only_open_left && outcome.gave_up == 0)) break;
  }
  if (begin == count) return;
  const int64_t stored = keepable == 0 ? most : std::max<int64_t>(1, most - for_values / row_bytes);
  at::Tensor logits = at::empty({stored, vocab_size}, c10::CppTypeToScalarType<Stored>::value);
  for (; begin < count; begin += stored) {
    const int64_t size = std::min(stored, count - begin);
    draw_stored<T>(arguments, rows + begin, size, logits.data_ptr<Stored>(), drawn + begin);
  }
}

// The same in an eighth of what all logits take in the dtype of the head. A product has been rounded to it: it need not
// be stored in more, unless a scale or a softcap has been applied to it since.
template <typename T>
void draw_filtered(const HeadArguments& arguments, Row* rows, int64_t count, int64_t* drawn) {
  const int64_t bytes = arguments.hidden.size(0) * arguments.weight.size(0) * int64_t(sizeof(T)) / 8;
  if constexpr (sizeof(T) < sizeof(float)) {
    if (float(arguments.logit_scale) == 1 && !arguments.softcap) {
      return draw_filtered<T, T>(arguments, rows, count, bytes, drawn);
    }
  }
  draw_filtered<T, float>(arguments, rows, count, bytes, drawn);
}

// ---- The ops --------------------------------------------------------------------------------------------------------

// Calls f with a number of the dtype of `hidden`.
template <typename F>
auto with_dtype(const at::Tensor& hidden, F f) {
  switch (hidden.scalar_type()) {
    case at::kFloat: return f(float());
    case at::kDouble: return f(double());
    case at::kBFloat16: return f(at::BFloat16());
    case at::kHalf: return f(at::Half());
    default:
      TORCH_CHECK_TYPE(false, "hidden must be float32, bfloat16, float16 or float64, got ", hidden.scalar_type());
  }
}

Mixed linear_sample_mix(const HeadArguments& arguments, const Sampling& sampling) {
  check_head(arguments);
  Rows rows(arguments.hidden.size(0), sampling);
  const int64_t vocab_size = arguments.weight.size(0), count = rows.selected.size();
  Row* const row = rows.selected.data();
  std::vector<int64_t> drawn(count);
  with_dtype(arguments.hidden, [&](auto type) {
    using T = decltype(type);
    const auto is_plain = [&](const Row& row) { return !row.filters.drop_any(vocab_size); };
    const int64_t plain = std::partition(row, row + count, is_plain) - row;
    if (plain > 0) {
      const std::vector<Draw> draws = draw_rows<T>(arguments, row, plain, groups_of(vocab_size) * kGroup);
      for (int64_t i = 0; i < plain; ++i) drawn[i] = draws[i].is_valid() ? draws[i].candidate(1).token : kInvalid;
    }
    if (plain < count) draw_filtered<T>(arguments, row + plain, count - plain, drawn.data() + plain);
  });
  return mix(rows, drawn);
}

at::Tensor linear_reference_log_prob(const HeadArguments& arguments, const Sampling& sampling) {
  check_head(arguments);
  const Rows rows(arguments.hidden.size(0), sampling);
  return with_dtype(arguments.hidden, [&](auto type) {
    if (rows.selected.empty()) return log_probs(rows, {}, {}, {}, 0);
    return head_log_probs<decltype(type)>(arguments, rows);
  });
}

std::tuple<at::Tensor, at::Tensor> linear_sample_shard(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, std::optional<double> softcap,
    double logit_scale, int64_t first_id, const at::Tensor& threshold, int64_t seed, const at::Tensor& sample_ids,
    const at::Tensor& positions, const at::Tensor& inv_temperature) {
  const HeadArguments arguments{hidden, weight, bias, softcap, logit_scale, first_id};
  check_head(arguments);
  const Rows rows(hidden.size(0), {std::nullopt, threshold, seed, sample_ids, positions, inv_temperature});
  at::Tensor values = at::full({hidden.size(0), 3, 3}, -kInf, hidden.options().dtype(at::kFloat));
  at::Tensor ids = at::full({hidden.size(0), 3}, -1, hidden.options().dtype(at::kLong));
  with_dtype(hidden, [&](auto type) {
    if (rows.selected.empty()) return;
    const auto draws = draw_rows<decltype(type)>(
        arguments, rows.selected.data(), rows.selected.size(), first_id + weight.size(0));
    for (const Draw& draw : draws) {
      float* value = values.data_ptr<float>() + draw.row().index * 9;
      int64_t* id = ids.data_ptr<int64_t>() + draw.row().index * 3;
      for (int64_t i = 0; i < 3; ++i, value += 3) {
        const Candidate& best = draw.candidate(i);
        const float numbers[3] = {best.mass, best.noise, best.inner};
        for (int64_t j = 0; j < 3; ++j) value[j] = draw.is_valid() ? numbers[j] : std::nanf("");
        id[i] = best.token;
      }
    }
  });
  return {values, ids};
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) {
  using Op = SamplingOp<const at::Tensor&, const at::Tensor&, const OptionalTensor&, std::optional<double>, double>;
  m.impl("linear_sample_mix", Op::mix<linear_sample_mix>);
  m.impl("linear_sample_shard", linear_sample_shard);
  m.impl("linear_reference_log_prob", Op::log_prob<linear_reference_log_prob>);
}
