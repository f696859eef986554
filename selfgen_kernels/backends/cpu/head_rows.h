// Products of rows of `hidden` with the weights of a head: their logits, 64 ids at a time.
//
// A logit depends on its own row of `hidden` and `weight` only: neither the batch nor the number of threads changes a
// bit of it. Sums are fp32 (fp64 for fp64 heads) and round to the dtype of the head, as a linear layer's do.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "checks.h"
#include "groups.h"
#include "product.h"
#include "row.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <type_traits>

namespace {

constexpr int64_t kDepth = 256;  // Numbers at a time: what multiplies 8 ids then stays in the nearest cache
constexpr int64_t kIds = 8;      // that are multiplied at a time
constexpr int64_t kTask = 16;    // groups that a thread takes at a time, at most

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

// ---- One function per level of x86; vectors are as long as its registers --------------------------------------------

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

// ---- The rows of a call ---------------------------------------------------------------------------------------------

// What an op is told of the head: the first arguments of its schema, in this order.
struct HeadArguments {
  const at::Tensor &hidden, &weight;  // [N, D], [V, D]
  const OptionalTensor& bias;         // [V]
  std::optional<double> softcap;
  double logit_scale;
  int64_t first_id = 0;  // of the ids of `weight`
};

inline void check_head(const HeadArguments& head) {
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
      : HeadRows(arguments, count, [&](int64_t i) { return rows[i].index; }) {}

  // Of the rows index_of(0), .., index_of(count - 1) of `hidden`.
  template <typename F>
  HeadRows(const HeadArguments& arguments, int64_t count, F index_of)
      : level_(best_level<T>(arguments.weight)), first_id_(arguments.first_id), size_(arguments.weight.size(0)) {
    const at::Tensor &hidden = arguments.hidden, &weight = arguments.weight;
    const int64_t depth = weight.size(1), vectors = (count + level_.lanes - 1) / level_.lanes;
    const auto options = hidden.options().dtype(c10::CppTypeToScalarType<Real>::value);
    if (level_.in_pairs) {
      packed_ = at::zeros({vectors * level_.lanes * depth}, hidden.options());
      pack<2>(hidden, index_of, count, vectors, packed_.template data_ptr<T>());
    } else {
      packed_ = at::zeros({vectors * level_.lanes * depth}, options);
      pack<1>(hidden, index_of, count, vectors, packed_.template data_ptr<Real>());
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
  template <int64_t together, typename To, typename F>
  void pack(const at::Tensor& hidden, F index_of, int64_t count, int64_t vectors, To* to) {
    const int64_t depth = hidden.size(1);
    const T* from = hidden.const_data_ptr<T>();
    for_each_strip(vectors, [&](int64_t vector, int64_t strip) {
      const int64_t lanes = strip * level_.lanes, first = vector * level_.lanes;
      for (int64_t i = 0; i < std::min(lanes, count - first); ++i) {
        const T* row = from + index_of(first + i) * hidden.stride(0);
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

}  // namespace
