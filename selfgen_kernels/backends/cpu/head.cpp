// linear_sample_mix, linear_sample_shard and linear_reference_log_prob on CPU; their contract is in ops/sampling.py.
//
// The vocabulary passes by in groups: the product of one group's head with all rows, which lie in vector lanes, then
// the draw of each row takes the group in. Without a filter nothing else is kept of the logits. With one, the values
// that reach a bound of the row's cutoff are (kept.h), or, where these do not fit, all logits of a few rows at a time.
// From what is kept, rows are drawn as sample_mix does. Of a probability, what is kept is the mass of each group.
//
// A logit depends on its own row of `hidden` and `weight` only: neither the batch nor the number of threads changes a
// bit of it. Sums are fp32 (fp64 for fp64 heads) and round to the dtype of the head, as a linear layer's do.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "draw.h"
#include "kept.h"
#include "product.h"
#include "rows.h"
#include "sampling.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <optional>
#include <vector>

namespace {

constexpr int64_t kDepth = 256;  // Numbers at a time: what multiplies 8 ids then stays in the nearest cache
constexpr int64_t kIds = 8;      // that are multiplied at a time
constexpr int64_t kTask = 16;    // groups that a thread takes at a time, at most
constexpr int64_t kEnough = 64;  // rows for a product that takes as long a row as one of more rows

// What is multiplied at a time: a Number is an Accumulator<T>, or a Pair.
template <typename Number>
constexpr int64_t kDepths = std::is_same_v<Number, Pair> ? 2 : 1;

// What all groups of a call share: the head, and the rows of `hidden` that it multiplies.
template <typename T>
struct Head {
  const T *weight, *bias;  // no bias: null
  int64_t id_stride, inner_stride, bias_stride;
  int64_t depth;                  // D
  const void* hidden;             // Numbers: strip after strip of [depth / kDepths, lanes]
  int64_t vectors;                // of all strips together, a vector holding `lanes` rows
  float logit_scale, softcap;     // no cap: 0
};

// Scratch memory of a thread.
template <typename T>
struct Buffers {
  Accumulator<T>* product;  // strip after strip of [64, lanes]
  Accumulator<T>* weight;   // [kIds, kDepth], for dtypes that are not multiplied as they are
  float* logits;            // [64, all lanes]
};

// Calls f(first vector, vectors) for strips of at most kVectors, as even as they can be.
template <typename F>
SELFGEN_INLINE void for_each_strip(int64_t vectors, F f) {
  const int64_t strips = (vectors + kVectors - 1) / kVectors;
  for (int64_t i = 0; i < strips; ++i) f(vectors * i / strips, vectors * (i + 1) / strips - vectors * i / strips);
}

// The head of `count` ids from `first` at some depth, `begin` and `inner` Numbers: in place, or copied to `buffer`.
template <typename Number, typename T>
SELFGEN_INLINE const Number* load_weight(
    const Head<T>& head, int64_t first, int64_t count, int64_t begin, int64_t inner, Accumulator<T>* buffer,
    int64_t* id_stride, int64_t* inner_stride) {
  const T* weight = head.weight + first * head.id_stride + begin * kDepths<Number> * head.inner_stride;
  if constexpr (std::is_same_v<T, Number>) {
    *id_stride = head.id_stride;
    *inner_stride = head.inner_stride;
    return weight;
  } else if constexpr (std::is_same_v<Number, Pair>) {
    *id_stride = head.id_stride / 2;
    *inner_stride = 1;
    return reinterpret_cast<const Pair*>(weight);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const T* from = weight + i * head.id_stride;
      if (head.inner_stride == 1) {
        for (int64_t d = 0; d < inner; ++d) buffer[i * kDepth + d] = float(from[d]);
      } else {
        for (int64_t d = 0; d < inner; ++d) buffer[i * kDepth + d] = float(from[d * head.inner_stride]);
      }
    }
    *id_stride = kDepth;
    *inner_stride = 1;
    return buffer;
  }
}

// Asks for `count` ids of the head before they are needed: they lie too far apart for the hardware to guess.
template <typename Number, typename T>
SELFGEN_INLINE void prefetch(const Head<T>& head, int64_t first, int64_t count, int64_t begin, int64_t inner) {
  if (head.inner_stride != 1) return;
  for (int64_t i = 0; i < count; ++i) {
    const T* from = head.weight + (first + i) * head.id_stride + begin * kDepths<Number>;
    for (int64_t d = 0; d < inner * kDepths<Number>; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + d);
  }
}

// Logits fp32 [count, lanes of all vectors] of `count` <= 64 ids from `first`: buffers.logits.
template <int64_t BYTES, typename Number, typename T>
SELFGEN_INLINE void group_logits(const Head<T>& head, int64_t first, int64_t count, const Buffers<T>& buffers) {
  using Real = Accumulator<T>;
  typedef Real Vec __attribute__((vector_size(BYTES), may_alias));
  constexpr int64_t lanes = BYTES / sizeof(Real);
  Real one[kVectors * lanes];
  std::fill_n(one, kVectors * lanes, Real(1));
  const int64_t depth = head.depth / kDepths<Number>;
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kDepth) {
    const int64_t inner = std::min(kDepth, depth - begin);
    for (int64_t i = 0; i < count; i += kIds) {
      const int64_t ids = std::min(kIds, count - i);
      prefetch<Number>(head, first + i + ids, std::min(kIds, count - i - ids), begin, inner);
      int64_t id_stride, inner_stride;
      const Number* weight =
          load_weight<Number>(head, first + i, ids, begin, inner, buffers.weight, &id_stride, &inner_stride);
      for_each_strip(head.vectors, [&](int64_t vector, int64_t vectors) __attribute__((always_inline)) {
        const int64_t row = vectors * lanes;
        const Matrix<Real> product{buffers.product + vector * kGroup * lanes + i * row, row};
        const Matrix<const Real> add{begin > 0 ? one : nullptr, 0};
        const Matrix<const Number> ids_of{weight, id_stride};
        const Matrix<const Number> hidden{(const Number*)head.hidden + vector * depth * lanes + begin * row, row};
        if (vectors == 1) multiply<kIds, 1, Vec>(product, ids, ids_of, inner_stride, hidden, inner, add);
        if (vectors == 2) multiply<kIds, 2, Vec>(product, ids, ids_of, inner_stride, hidden, inner, add);
        if (vectors == 3) multiply<kIds, 3, Vec>(product, ids, ids_of, inner_stride, hidden, inner, add);
      });
    }
  }
  for_each_strip(head.vectors, [&](int64_t vector, int64_t vectors) __attribute__((always_inline)) {
    const Real* product = buffers.product + vector * lanes * kGroup;
    for (int64_t i = 0; i < count; ++i) {
      const Real bias = head.bias ? Real(head.bias[(first + i) * head.bias_stride]) : 0;
      float* out = buffers.logits + i * head.vectors * lanes + vector * lanes;
      for (int64_t j = 0; j < vectors * lanes; ++j) {
        out[j] = float(T(product[i * vectors * lanes + j] + bias)) * head.logit_scale;
      }
      if (head.softcap > 0) {
        for (int64_t j = 0; j < vectors * lanes; ++j) out[j] = head.softcap * tanh_(out[j] / head.softcap);
      }
    }
  });
}

// ---- One function a level of x86; vectors are as long as its registers ----------------------------------------------

template <typename T>
struct Level {
  int64_t lanes;
  void (*group_logits)(const Head<T>&, int64_t, int64_t, const Buffers<T>&);
  bool in_pairs;  // Number is Pair
};

#if SELFGEN_X86_LEVELS
#if SELFGEN_X86_BF16
template <typename T>
SELFGEN_LEVEL("avx512f")
void group_logits_avx512_bf16(const Head<T>& head, int64_t first, int64_t count, const Buffers<T>& buffers) {
  group_logits<64, Pair>(head, first, count, buffers);
}
#endif
template <typename T>
SELFGEN_LEVEL("avx512f")
void group_logits_avx512(const Head<T>& head, int64_t first, int64_t count, const Buffers<T>& buffers) {
  group_logits<64, Accumulator<T>>(head, first, count, buffers);
}
template <typename T>
SELFGEN_LEVEL("avx2,fma")
void group_logits_avx2(const Head<T>& head, int64_t first, int64_t count, const Buffers<T>& buffers) {
  group_logits<32, Accumulator<T>>(head, first, count, buffers);
}
#endif
template <typename T>
void group_logits_default(const Head<T>& head, int64_t first, int64_t count, const Buffers<T>& buffers) {
  group_logits<16, Accumulator<T>>(head, first, count, buffers);
}

// Of the rows of `hidden` only the head may decide: a row's bits are the same in any batch.
template <typename T>
Level<T> best_level([[maybe_unused]] const at::Tensor& weight) {
  constexpr int64_t size = sizeof(Accumulator<T>);
#if SELFGEN_X86_BF16
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const bool in_pairs = weight.size(1) % 2 == 0 && weight.stride(0) % 2 == 0 && weight.stride(1) == 1;
    if (kIsa >= Isa::kAvx512Bf16 && in_pairs) return {64 / size, group_logits_avx512_bf16<T>, true};
  }
#endif
#if SELFGEN_X86_LEVELS
  if (kIsa >= Isa::kAvx512) return {64 / size, group_logits_avx512<T>, false};
  if (kIsa >= Isa::kAvx2) return {32 / size, group_logits_avx2<T>, false};
#endif
  return {16 / size, group_logits_default<T>, false};
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

struct HeadArguments {
  const at::Tensor &hidden, &weight;
  const OptionalTensor& bias;
  std::optional<double> softcap;
  double logit_scale;
  int64_t first_id;
};

void check_head(const HeadArguments& head) {
  check_shape(head.hidden, "hidden", {kAny, kAny});
  check(head.weight, "weight", head.hidden.scalar_type(), {kAny, head.hidden.size(1)});
  check_vocabulary(head.weight.size(0));
  check(head.bias, "bias", head.hidden.scalar_type(), {head.weight.size(0)});
  TORCH_CHECK_VALUE(
      0 <= head.first_id && head.first_id < 1LL << 31, "first_id=", head.first_id,
      " is not accepted; pass 0 <= first_id < 2**31");
}

// The logits of some rows, group by group.
template <typename T>
class HeadRows {
 public:
  using Real = Accumulator<T>;

  HeadRows(const HeadArguments& arguments, const Row* rows, int64_t count)
      : level_(best_level<T>(arguments.weight)), first_id_(arguments.first_id), size_(arguments.weight.size(0)) {
    const at::Tensor &hidden = arguments.hidden, &weight = arguments.weight;
    const int64_t depth = weight.size(1), vectors = (count + level_.lanes - 1) / level_.lanes;
    const auto options = hidden.options().dtype(c10::CppTypeToScalarType<Real>::value);
    if (level_.in_pairs) {
      packed_ = at::zeros({vectors * level_.lanes * depth}, hidden.options());
      pack<2>(hidden, rows, count, vectors, packed_.template data_ptr<T>());
    } else {
      packed_ = at::zeros({vectors * level_.lanes * depth}, options);
      pack<1>(hidden, rows, count, vectors, packed_.template data_ptr<Real>());
    }
    head_ = {weight.const_data_ptr<T>(),
             arguments.bias ? arguments.bias->const_data_ptr<T>() : nullptr,
             weight.stride(0),
             weight.stride(1),
             arguments.bias ? arguments.bias->stride(0) : 0,
             depth,
             packed_.data_ptr(),
             vectors,
             float(arguments.logit_scale),
             float(arguments.softcap.value_or(0))};
    threads_ = at::get_num_threads();
    const int64_t lanes = vectors * level_.lanes, copied = std::is_same_v<T, Real> ? 0 : kIds * kDepth;
    products_ = at::empty({threads_, kGroup * lanes + copied}, options);
    logits_ = at::empty({threads_, kGroup * lanes}, at::kFloat);
  }

  int64_t lanes() const { return head_.vectors * level_.lanes; }
  int64_t threads() const { return threads_; }

  // Calls f(thread, group, first, count, logits) for all groups, from several threads, in rising order on each, until
  // it returns false. The shard's ids first, .., first + count - 1 are in the group; logits are [count, lanes()].
  template <typename F>
  void for_each_group(F f) const {
    const int64_t begin = first_id_ / kGroup, end = groups_of(first_id_ + size_);
    const int64_t task = std::clamp<int64_t>((end - begin) / (4 * threads_), 1, kTask);
    std::atomic<int64_t> next{begin};
    at::parallel_for(0, threads_, 1, [&](int64_t thread, int64_t last_thread) {
      for (; thread < last_thread; ++thread) {
        Real* const product = products_.template data_ptr<Real>() + thread * products_.size(1);
        float* const logits = logits_.template data_ptr<float>() + thread * logits_.size(1);
        const Buffers<T> buffers{product, product + kGroup * lanes(), logits};
        for (int64_t start; (start = next.fetch_add(task)) < end;) {
          for (int64_t group = start; group < std::min(start + task, end); ++group) {
            const int64_t first = std::max<int64_t>(0, group * kGroup - first_id_);
            const int64_t count = std::min(size_, (group + 1) * kGroup - first_id_) - first;
            level_.group_logits(head_, first, count, buffers);
            if (!f(thread, group, first, count, (const float*)logits)) next = end;
          }
        }
      }
    });
  }

 private:
  // The rows of `hidden`, strip after strip of [depth / together, lanes, together].
  template <int64_t together, typename To>
  void pack(const at::Tensor& hidden, const Row* rows, int64_t count, int64_t vectors, To* to) {
    const int64_t depth = hidden.size(1);
    const T* from = hidden.const_data_ptr<T>();
    for_each_strip(vectors, [&](int64_t vector, int64_t strip) {
      const int64_t lanes = strip * level_.lanes, first = vector * level_.lanes;
      for (int64_t i = 0; i < std::min(lanes, count - first); ++i) {
        const T* row = from + rows[first + i].index * hidden.stride(0);
        To* own = to + first * depth + i * together;
        for (int64_t d = 0; d < depth; ++d) {
          own[d / together * together * lanes + d % together] = To(row[d * hidden.stride(1)]);
        }
      }
    });
  }

  Level<T> level_;
  int64_t first_id_, size_, threads_;
  at::Tensor packed_, products_, logits_;
  Head<T> head_;
};

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

// Maxima and sums of exponentials of a group's logits [size, lanes], NaN being +inf: those of the first `count` lanes.
SELFGEN_INLINE void lane_masses_(
    const float* logits, int64_t size, int64_t lanes, int64_t count, float* __restrict peak, float* __restrict sum) {
  std::fill_n(peak, count, -kInf);
  std::fill_n(sum, count, 0.f);
  for (int64_t j = 0; j < size; ++j) {
    for (int64_t i = 0; i < count; ++i) {
      const float z = logits[j * lanes + i], x = z == z ? z : kInf;
      peak[i] = x > peak[i] ? x : peak[i];
    }
  }
  for (int64_t j = 0; j < size; ++j) {
    for (int64_t i = 0; i < count; ++i) sum[i] += exp_(logits[j * lanes + i] - peak[i]);
  }
}
SELFGEN_CLONES(
    void, lane_masses,
    (const float* logits, int64_t size, int64_t lanes, int64_t count, float* __restrict peak, float* __restrict sum),
    (logits, size, lanes, count, peak, sum))

// The log probability of each row's token, at temperature 1: `out` at the row's index. What is kept of the logits is the
// mass of each group: groups are added up in their order, so that threads don't change a bit.
template <typename T>
void log_probs(const HeadArguments& arguments, const std::vector<Row>& rows, const int64_t* tokens, float* out) {
  const int64_t vocab_size = arguments.weight.size(0), groups = groups_of(vocab_size), count = rows.size();
  const HeadRows<T> head(arguments, rows.data(), count);
  std::vector<float> found(count, -kInf), buffers(head.threads() * 2 * count);
  std::vector<Mass> masses(count * groups);
  head.for_each_group([&](int64_t thread, int64_t group, int64_t first, int64_t size, const float* logits) {
    float *const peak = buffers.data() + thread * 2 * count, *const sum = peak + count;
    lane_masses(logits, size, head.lanes(), count, peak, sum);
    for (int64_t i = 0; i < count; ++i) {
      masses[i * groups + group] = {peak[i], peak[i] > -kInf ? sum[i] : 0};
      const int64_t token = tokens[rows[i].index];
      if (first <= token && token < first + size) found[i] = logits[(token - first) * head.lanes() + i];
    }
    return true;
  });
  for (int64_t i = 0; i < count; ++i) out[rows[i].index] = log_prob(found[i], masses.data() + i * groups, groups);
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

Mixed linear_sample_mix(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, std::optional<double> softcap,
    double logit_scale, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed,
    const at::Tensor& sample_ids, const at::Tensor& positions, const at::Tensor& inv_temperature,
    const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p) {
  const HeadArguments arguments{hidden, weight, bias, softcap, logit_scale, 0};
  check_head(arguments);
  check(reference, "reference", at::kLong, {hidden.size(0)});
  Rows rows(hidden.size(0), threshold, seed, sample_ids, positions, inv_temperature, top_k, top_p, min_p);
  const int64_t vocab_size = weight.size(0), count = rows.selected.size();
  Row* const row = rows.selected.data();
  std::vector<int64_t> drawn(count);
  with_dtype(hidden, [&](auto type) {
    using T = decltype(type);
    const auto is_plain = [&](const Row& row) { return !row.filters.drop_any(vocab_size); };
    const int64_t plain = std::partition(row, row + count, is_plain) - row;
    if (plain > 0) {
      const std::vector<Draw> draws = draw_rows<T>(arguments, row, plain, groups_of(vocab_size) * kGroup);
      for (int64_t i = 0; i < plain; ++i) drawn[i] = draws[i].is_valid() ? draws[i].candidate(1).token : -1;
    }
    if (plain < count) draw_filtered<T>(arguments, row + plain, count - plain, drawn.data() + plain);
  });
  return mix(reference, rows, drawn);
}

at::Tensor linear_reference_log_prob(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, std::optional<double> softcap,
    double logit_scale, const at::Tensor& reference, const at::Tensor& threshold, int64_t seed,
    const at::Tensor& sample_ids, const at::Tensor& positions) {
  const HeadArguments arguments{hidden, weight, bias, softcap, logit_scale, 0};
  check_head(arguments);
  const int64_t count = hidden.size(0);
  check(reference, "reference", at::kLong, {count});
  const at::Tensor temperature = at::ones({count}, at::kFloat), tokens = reference.contiguous();
  const Rows rows(count, threshold, seed, sample_ids, positions, temperature, {}, {}, {});
  at::Tensor result = at::zeros({count}, at::kFloat);
  with_dtype(hidden, [&](auto type) {
    if (rows.selected.empty()) return;
    log_probs<decltype(type)>(
        arguments, rows.selected, tokens.const_data_ptr<int64_t>(), result.data_ptr<float>());
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> linear_sample_shard(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, std::optional<double> softcap,
    double logit_scale, int64_t first_id, const at::Tensor& threshold, int64_t seed, const at::Tensor& sample_ids,
    const at::Tensor& positions, const at::Tensor& inv_temperature) {
  const HeadArguments arguments{hidden, weight, bias, softcap, logit_scale, first_id};
  check_head(arguments);
  const Rows rows(hidden.size(0), threshold, seed, sample_ids, positions, inv_temperature, {}, {}, {});
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
  m.impl("linear_sample_mix", linear_sample_mix);
  m.impl("linear_sample_shard", linear_sample_shard);
  m.impl("linear_reference_log_prob", linear_reference_log_prob);
}
