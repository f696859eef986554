// kv_append and ragged_attention on CPU. The latter is a streaming softmax (flash attention, arXiv 2205.14135).
//
// A row is one query of one head; the heads of a group share their K/V head's tiles. A wide tile is up to three vectors
// of rows. Its scores lie as [keys, rows] and its outputs as [head_dim, rows], so both products are the same: a matrix
// of K or V, read in place one number at a time, times a matrix of whole vectors. A narrow tile is the rows of one
// query, too few to fill a vector: there keys lie in the lanes of scores, and head_dim in those of outputs. Both add
// the same numbers in the same order, so they give the same bits. No sum ever crosses lanes.
//
// A lane's result depends on its own query and keys only: keys are taken in blocks that start at multiples of kBlock
// from the first key of the range, within a block one by one, and what a lane does not see adds exact zeros. How chunks
// and tiles are cut, and on how many threads they run, does not change a bit.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"
#include "product.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kBlock = 32;         // keys at a time
constexpr int64_t kMostKeys = 1 << 30;  // of a chunk: with them, lanes count in 32 bits

// A tensor [rows, heads, head_dim] whose last axis is dense.
template <typename T>
struct View {
  explicit View(const at::Tensor& tensor)
      : data(tensor.const_data_ptr<T>()), row_stride(tensor.stride(0)), head_stride(tensor.stride(1)) {}
  const T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
  const T* data;
  int64_t row_stride, head_stride;
};

// What all tiles of a call share.
template <typename T>
struct Call {
  View<T> query, key, value;
  const Accumulator<T>* sinks;  // [heads], or null
  T* out;                       // [N, heads, head_dim], dense
  int64_t heads, group, head_dim, window;
  Accumulator<T> scale, softcap;  // no cap: 0
};

// Rows first_row, .. of a chunk and a K/V head; row r is query r / group, head r % group of the K/V head.
struct Tile {
  int64_t first_query, queries, first_slot, keys;  // the chunk
  int64_t kv_head, first_row, vectors;             // no vectors: a narrow tile
};

// ---- Arithmetic on lanes --------------------------------------------------------------------------------------------

SELFGEN_INLINE double tanh_(double x) { return std::tanh(x); }
SELFGEN_INLINE double exp_(double x) { return std::exp(x); }

template <typename Real>
SELFGEN_INLINE Real weight_of(Real below_largest) {
  return exp_(below_largest) * (below_largest < -87 ? 0 : 1);  // nothing at all where nothing is seen
}

// Scores [keys, LANES] become weights relative to the largest score so far; `factor` is what earlier weights shrink by.
template <int64_t LANES, typename Real>
SELFGEN_INLINE void softmax_step(Real* scores, int64_t keys, Real* largest, Real* total, Real* factor) {
  Real now[LANES];
  for (int64_t i = 0; i < LANES; ++i) now[i] = largest[i];
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t i = 0; i < LANES; ++i) now[i] = scores[k * LANES + i] > now[i] ? scores[k * LANES + i] : now[i];
  }
  for (int64_t i = 0; i < LANES; ++i) {
    factor[i] = exp_(largest[i] - now[i]);
    largest[i] = now[i];
    total[i] *= factor[i];
  }
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t i = 0; i < LANES; ++i) {
      const Real weight = weight_of(scores[k * LANES + i] - now[i]);
      total[i] += weight;
      scores[k * LANES + i] = weight;
    }
  }
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

// Rows `first`, .. of a K or V head in the accumulator's type: in place if they have it, else copied to `buffer`.
template <typename T, typename Real>
SELFGEN_INLINE const Real* load_block(
    const View<T>& view, int64_t first, int64_t rows, int64_t head, int64_t head_dim, Real* buffer, int64_t* stride) {
  if constexpr (std::is_same_v<T, Real>) {
    *stride = view.row_stride;
    return view.at(first, head);
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = view.at(first + row, head);
      for (int64_t d = 0; d < head_dim; ++d) buffer[row * head_dim + d] = float(from[d]);
    }
    *stride = head_dim;
    return buffer;
  }
}

// Rows of V at `value` in `clean`, with 0 for what is not finite; null if all is finite. 0 * NaN is not 0.
template <typename Real>
SELFGEN_INLINE const Real* without_nan(
    const Real* value, int64_t rows, int64_t head_dim, int64_t stride, Real* clean) {
  Real zero = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < head_dim; ++d) zero += value[row * stride + d] * 0;
  }
  if (zero == 0) return nullptr;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < head_dim; ++d) {
      const Real x = value[row * stride + d];
      clean[row * head_dim + d] = x * 0 == 0 ? x : 0;
    }
  }
  return clean;
}

// Ask for a block of K or V before it is needed: its rows lie too far apart for the hardware to guess.
template <typename T>
SELFGEN_INLINE void prefetch(const View<T>& view, int64_t first, int64_t rows, int64_t head, int64_t head_dim) {
  for (int64_t row = first; row < first + rows; ++row) {
    const T* from = view.at(row, head);
    for (int64_t d = 0; d < head_dim; d += 64 / sizeof(T)) __builtin_prefetch(from + d);
  }
}

// The largest score, sink included, and the sum of weights with which a row starts.
template <typename T, typename Real>
SELFGEN_INLINE void start_row(const Call<T>& call, int64_t head, Real* largest, Real* total) {
  const Real lowest = std::numeric_limits<Real>::lowest(), sink = call.sinks ? call.sinks[head] : lowest;
  *largest = sink <= lowest ? lowest : sink;
  *total = sink <= lowest ? 0 : 1;
}

template <int64_t BYTES, int64_t V, typename T>
SELFGEN_INLINE void attend_wide(const Call<T>& call, const Tile& tile, Accumulator<T>* scratch) {
  using Real = Accumulator<T>;
  using Index = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  typedef Real Vec __attribute__((vector_size(BYTES), may_alias));
  constexpr int64_t LANES = V * (BYTES / sizeof(Real)), ROWS = BYTES == 64 ? 8 : 4;
  const int64_t head_dim = call.head_dim, rows = std::min(LANES, tile.queries * call.group - tile.first_row);

  Real* const query = scratch;                    // [head_dim, LANES]
  Real* const out = query + head_dim * LANES;     // [head_dim, LANES]
  Real* const scores = out + head_dim * LANES;    // [kBlock, LANES]
  Real* const buffer = scores + kBlock * LANES;   // [kBlock, head_dim]
  Real* const clean = buffer + kBlock * head_dim; // [kBlock, head_dim]
  alignas(BYTES) Real largest[LANES], total[LANES], factor[LANES];
  Index first[LANES], last[LANES];  // keys that a lane sees
  const auto head_of = [&](int64_t lane) { return tile.kv_head * call.group + (tile.first_row + lane) % call.group; };
  const auto query_of = [&](int64_t lane) { return (tile.first_row + lane) / call.group; };

  for (int64_t i = 0; i < LANES; ++i) {
    const int64_t lane = std::min(i, rows - 1);  // spare lanes repeat the last row
    const int64_t position = tile.keys - tile.queries + query_of(lane);
    first[i] = Index(std::max<int64_t>(0, position - call.window + 1));
    last[i] = Index(position);
    start_row(call, head_of(lane), &largest[i], &total[i]);
    const T* from = call.query.at(tile.first_query + query_of(lane), head_of(lane));
    for (int64_t d = 0; d < head_dim; ++d) query[d * LANES + i] = Real(from[d]) * call.scale;
  }
  std::fill_n(out, head_dim * LANES, Real(0));

  const int64_t end = last[LANES - 1] + 1;
  for (int64_t start = first[0] / kBlock * kBlock; start < end; start += kBlock) {
    const int64_t keys = std::min(kBlock, end - start), slot = tile.first_slot + start;
    const int64_t next_keys = std::min(kBlock, end - start - keys);
    int64_t stride;
    prefetch(call.value, slot, keys, tile.kv_head, head_dim);
    const Real* key = load_block(call.key, slot, keys, tile.kv_head, head_dim, buffer, &stride);
    multiply<ROWS, V, Vec, Real>({scores, LANES}, keys, {key, stride}, 1, {query, LANES}, head_dim, {nullptr, 0});
    if (call.softcap > 0) {
      for (int64_t i = 0; i < keys * LANES; ++i) scores[i] = call.softcap * tanh_(scores[i] / call.softcap);
    }
    const bool edge = start < first[LANES - 1] || start + keys - 1 > last[0];  // not all lanes see all keys
    if (edge) {
      for (int64_t k = 0; k < keys; ++k) {
        const Index at = Index(start + k);
        for (int64_t i = 0; i < LANES; ++i) {
          const Real score = scores[k * LANES + i];
          scores[k * LANES + i] = (at >= first[i]) & (at <= last[i]) ? score : -std::numeric_limits<Real>::infinity();
        }
      }
    }
    softmax_step<LANES>(scores, keys, largest, total, factor);
    prefetch(call.key, slot + keys, next_keys, tile.kv_head, head_dim);
    const Real* value = load_block(call.value, slot, keys, tile.kv_head, head_dim, buffer, &stride);
    const Real* finite = edge ? without_nan(value, keys, head_dim, stride, clean) : nullptr;
    const Matrix<const Real> weights{scores, LANES}, shrink{factor, 0};
    if (finite == nullptr) {
      multiply<ROWS, V, Vec, Real>({out, LANES}, head_dim, {value, 1}, stride, weights, keys, shrink);
      continue;
    }
    multiply<ROWS, V, Vec, Real>({out, LANES}, head_dim, {finite, 1}, head_dim, weights, keys, shrink);
    for (int64_t k = 0; k < keys; ++k) {  // what is not finite reaches the lanes that see it
      const Index at = Index(start + k);
      for (int64_t d = 0; d < head_dim; ++d) {
        const Real x = value[k * stride + d];
        if (x * 0 == 0) continue;
        for (int64_t i = 0; i < LANES; ++i) {
          if (at >= first[i] && at <= last[i]) out[d * LANES + i] += x * scores[k * LANES + i];
        }
      }
    }
  }

  for (int64_t lane = 0; lane < rows; ++lane) {
    T* to = call.out + ((tile.first_query + query_of(lane)) * call.heads + head_of(lane)) * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) to[d] = T(out[d * LANES + lane] / total[lane]);
  }
}

// x[i][j] becomes x[j][i], by swapping ever larger blocks across the diagonal.
template <int64_t L, typename Index, typename Vec>
SELFGEN_INLINE void transpose(Vec* x) {
  typedef Index Lanes __attribute__((vector_size(sizeof(Vec))));
#pragma GCC unroll 16
  for (int64_t step = 1; step < L; step *= 2) {
    Lanes upper, lower;
#pragma GCC unroll 16
    for (int64_t j = 0; j < L; ++j) {
      upper[j] = j & step ? L + j - step : j;
      lower[j] = j & step ? L + j : j + step;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) {
      if (i & step) continue;
      const Vec first = x[i], second = x[i + step];
      x[i] = __builtin_shuffle(first, second, upper);
      x[i + step] = __builtin_shuffle(first, second, lower);
    }
  }
}

template <int64_t BYTES, typename T>
SELFGEN_INLINE void attend_narrow(const Call<T>& call, const Tile& tile, Accumulator<T>* scratch) {
  using Real = Accumulator<T>;
  using Index = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  constexpr int64_t L = BYTES / sizeof(Real), ROWS = 4, WIDTH = BYTES == 64 ? 4 : 2;
  typedef Real Vec __attribute__((vector_size(BYTES), may_alias, aligned(sizeof(Real))));  // rows lie as they like
  const int64_t head_dim = call.head_dim, rows = call.group, head = tile.kv_head * rows;
  const int64_t at = tile.first_query + tile.first_row / rows;
  const int64_t position = tile.keys - tile.queries + tile.first_row / rows, end = position + 1;
  const int64_t first = std::max<int64_t>(0, end - call.window);

  Real* const query = scratch;                      // [rows, head_dim]
  Real* const out = query + rows * head_dim;        // [rows, head_dim]
  Real* const scores = out + rows * head_dim;       // [rows, kBlock]
  Real* const buffer = scores + rows * kBlock;      // [kBlock, head_dim]
  Real* const across = buffer + kBlock * head_dim;  // [head_dim, kBlock]
  Real largest[L], total[L], factor[L][WIDTH * L];  // of each row, of which there are fewer than lanes

  for (int64_t row = 0; row < rows; ++row) {
    start_row(call, head + row, &largest[row], &total[row]);
    const T* from = call.query.at(at, head + row);
    for (int64_t d = 0; d < head_dim; ++d) query[row * head_dim + d] = Real(from[d]) * call.scale;
  }
  std::fill_n(out, rows * head_dim, Real(0));

  for (int64_t start = first / kBlock * kBlock; start < end; start += kBlock) {
    const int64_t keys = std::min(kBlock, end - start), slot = tile.first_slot + start;
    const int64_t next_keys = std::min(kBlock, end - start - keys), skip = std::max<int64_t>(0, first - start);
    int64_t stride;
    prefetch(call.value, slot, keys, tile.kv_head, head_dim);
    const Real* key = load_block(call.key, slot, keys, tile.kv_head, head_dim, buffer, &stride);
    for (int64_t k = 0; k < keys; k += L) {
      for (int64_t d = 0; d < head_dim; d += L) {
        Vec block[L];
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) block[i] = *(const Vec*)(key + std::min(k + i, keys - 1) * stride + d);
        transpose<L, Index>(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) *(Vec*)(across + (d + i) * kBlock + k) = block[i];
      }
    }
    for (int64_t k = 0; k < keys; k += 2 * L) {
      multiply<ROWS, 2, Vec, Real>(
          {scores + k, kBlock}, rows, {query, head_dim}, 1, {across + k, kBlock}, head_dim, {nullptr, 0});
    }
    for (int64_t row = 0; row < rows; ++row) {
      Real* const score = scores + row * kBlock;
      if (call.softcap > 0) {
        for (int64_t k = 0; k < kBlock; ++k) score[k] = call.softcap * tanh_(score[k] / call.softcap);
      }
      for (int64_t k = 0; k < kBlock; ++k) {
        score[k] = k >= skip && k < keys ? score[k] : -std::numeric_limits<Real>::infinity();
      }
      Vec most = Vec{} + largest[row];
      for (int64_t k = 0; k < kBlock; k += L) {
        const Vec x = *(const Vec*)(score + k);
        most = x > most ? x : most;
      }
      Real now = largest[row];
      for (int64_t i = 0; i < L; ++i) now = most[i] > now ? most[i] : now;
      const Real shrink = exp_(largest[row] - now);
      largest[row] = now;
      for (int64_t i = 0; i < WIDTH * L; ++i) factor[row][i] = shrink;
      for (int64_t k = 0; k < kBlock; ++k) score[k] = weight_of(score[k] - now);
      Real sum = total[row] * shrink;
      for (int64_t k = skip; k < keys; ++k) sum += score[k];
      total[row] = sum;
    }
    prefetch(call.key, slot + keys, next_keys, tile.kv_head, head_dim);
    const Real* value = load_block(call.value, slot, keys, tile.kv_head, head_dim, buffer, &stride) + skip * stride;
    const auto weigh = [&](auto width, int64_t d) __attribute__((always_inline)) {
      multiply<ROWS, decltype(width)::value, Vec, Real>(
          {out + d, head_dim}, rows, {scores + skip, kBlock}, 1, {value + d, stride}, keys - skip,
          {factor[0], WIDTH * L});
    };
    int64_t d = 0;
    for (; d + WIDTH * L <= head_dim; d += WIDTH * L) weigh(std::integral_constant<int64_t, WIDTH>(), d);
    for (; d < head_dim; d += L) weigh(std::integral_constant<int64_t, 1>(), d);
  }

  for (int64_t row = 0; row < rows; ++row) {
    T* to = call.out + (at * call.heads + head + row) * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) to[d] = T(out[row * head_dim + d] / total[row]);
  }
}

template <int64_t BYTES, typename T>
SELFGEN_INLINE void attend(const Call<T>& call, const Tile& tile, Accumulator<T>* scratch) {
  if (tile.vectors == 0) return attend_narrow<BYTES>(call, tile, scratch);
  if (tile.vectors == 1) return attend_wide<BYTES, 1>(call, tile, scratch);
  if (tile.vectors == 2) return attend_wide<BYTES, 2>(call, tile, scratch);
  attend_wide<BYTES, 3>(call, tile, scratch);
}

// ---- One function a level of x86; vectors are as long as its registers ----------------------------------------------

template <typename T>
struct Level {
  int64_t lanes;
  void (*attend)(const Call<T>&, const Tile&, Accumulator<T>*);
};

#if SELFGEN_X86_LEVELS
template <typename T>
SELFGEN_LEVEL("avx512f") void attend_avx512(const Call<T>& call, const Tile& tile, Accumulator<T>* scratch) {
  attend<64>(call, tile, scratch);
}
template <typename T>
SELFGEN_LEVEL("avx2,fma") void attend_avx2(const Call<T>& call, const Tile& tile, Accumulator<T>* scratch) {
  attend<32>(call, tile, scratch);
}
#endif
template <typename T>
void attend_default(const Call<T>& call, const Tile& tile, Accumulator<T>* scratch) {
  attend<16>(call, tile, scratch);
}

template <typename T>
Level<T> best_level() {
  constexpr int64_t size = sizeof(Accumulator<T>);
#if SELFGEN_X86_LEVELS
  if (kIsa >= Isa::kAvx512) return {64 / size, attend_avx512<T>};
  if (kIsa >= Isa::kAvx2) return {32 / size, attend_avx2<T>};
#endif
  return {16 / size, attend_default<T>};
}

// ---- The op: its contract is in ops/attention.py --------------------------------------------------------------------

// The tiles of all chunks: narrow where that is less work, else at most `most` vectors each, as even as they can be.
std::vector<Tile> cut(
    const at::Tensor& cu_seqlens_q, const at::Tensor& kv_ranges, int64_t num_queries, int64_t slots, int64_t kv_heads,
    int64_t group, int64_t head_dim, int64_t lanes, int64_t most) {
  const int32_t* bounds = cu_seqlens_q.const_data_ptr<int32_t>();
  const int64_t *ranges = kv_ranges.const_data_ptr<int64_t>(), chunks = kv_ranges.size(0);
  TORCH_CHECK_VALUE(
      cu_seqlens_q.numel() == chunks + 1 && bounds[0] == 0 && bounds[chunks] <= num_queries &&
          std::is_sorted(bounds, bounds + chunks + 1),
      "cu_seqlens_q is ", at::IntArrayRef(std::vector<int64_t>(bounds, bounds + cu_seqlens_q.numel())), ", expected ",
      chunks + 1, " ascending numbers from 0 to at most the ", num_queries,
      " queries; pass the running sum of the chunks' lengths, with a 0 in front");
  std::vector<Tile> tiles;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = bounds[chunk], queries = bounds[chunk + 1] - begin;
    const int64_t first = ranges[2 * chunk], keys = ranges[2 * chunk + 1];
    TORCH_CHECK_VALUE(
        0 <= first && first <= slots && queries <= keys && keys <= std::min(kMostKeys, slots - first),
        "kv_ranges[", chunk, "] is [", first, ", ", keys, "], expected [first, length] inside the ", slots,
        " slots with length >= ", queries, ", the queries of the chunk, and at most 2**30; "
        "write their K/V first and count them in");
    const int64_t vectors = (queries * group + lanes - 1) / lanes, count = (vectors + most - 1) / most;
    // A number of K and V costs a wide tile two products, a narrow one of each query 2 group / lanes, and transposing.
    const bool narrow = head_dim % lanes == 0 && queries * (group + 2) <= lanes;
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      for (int64_t i = 0; narrow && i < queries; ++i) {
        tiles.push_back({begin, queries, first, keys, kv_head, i * group, 0});
      }
      for (int64_t i = 0; !narrow && i < count; ++i) {
        const int64_t from = vectors * i / count, to = vectors * (i + 1) / count;
        tiles.push_back({begin, queries, first, keys, kv_head, from * lanes, to - from});
      }
    }
  }
  return tiles;
}

template <typename T>
void run(
    at::Tensor& out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& cu_seqlens_q, const at::Tensor& kv_ranges, double scale, std::optional<int64_t> sliding_window,
    std::optional<double> softcap, const OptionalTensor& sinks) {
  using Real = Accumulator<T>;
  static const Level<T> level = best_level<T>();
  const int64_t heads = query.size(1), head_dim = query.size(2), kv_heads = key.size(1), group = heads / kv_heads;
  const int64_t threads = at::get_num_threads();

  const auto tiles_of = [&](int64_t most) {
    return cut(cu_seqlens_q, kv_ranges, query.size(0), key.size(0), kv_heads, group, head_dim, level.lanes, most);
  };
  std::vector<Tile> tiles = tiles_of(kVectors);
  if (int64_t(tiles.size()) < 2 * threads) tiles = tiles_of(1);  // smaller ones keep all threads busy
  if (tiles.empty()) return;

  const auto options = query.options().dtype(c10::CppTypeToScalarType<Real>::value);
  const int64_t lanes = kVectors * level.lanes, per_thread = 2 * head_dim * lanes + kBlock * (lanes + 2 * head_dim);
  at::Tensor scratch = at::empty({threads, per_thread}, options);
  const at::Tensor sink = sinks ? sinks->to(options.dtype()).contiguous() : at::Tensor();
  const Call<T> call{
      View<T>(query), View<T>(key), View<T>(value), sinks ? sink.const_data_ptr<Real>() : nullptr, out.data_ptr<T>(),
      heads, group, head_dim, sliding_window.value_or(key.size(0)), Real(scale), Real(softcap.value_or(0))};

  std::atomic<size_t> next{0};  // tiles differ in length: a thread takes the next one when it is done
  at::parallel_for(0, std::min<int64_t>(threads, tiles.size()), 1, [&](int64_t begin, int64_t) {
    Real* const own = scratch.data_ptr<Real>() + begin * per_thread;
    for (size_t i; (i = next++) < tiles.size();) level.attend(call, tiles[i], own);
  });
}

at::Tensor ragged_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& cu_seqlens_q,
    const at::Tensor& kv_ranges, double scale, std::optional<int64_t> sliding_window, std::optional<double> softcap,
    const OptionalTensor& sinks) {
  check_shape(query, "query", {kAny, kAny, kAny});
  const int64_t heads = query.size(1), head_dim = query.size(2);
  check(key, "key", query.scalar_type(), {kAny, kAny, head_dim});
  check(value, "value", query.scalar_type(), key.sizes());
  const int64_t kv_heads = key.size(1);
  TORCH_CHECK_VALUE(
      heads > 0 && head_dim > 0 && kv_heads > 0 && heads % kv_heads == 0, heads, " query heads of size ", head_dim,
      " cannot share ", kv_heads, " K/V heads; pass heads and head_dim >= 1, and heads a multiple of kv_heads");
  check(cu_seqlens_q, "cu_seqlens_q", at::kInt, {kAny});
  check(kv_ranges, "kv_ranges", at::kLong, {kAny, 2});
  TORCH_CHECK_VALUE(
      sliding_window.value_or(1) >= 1, "sliding_window=", *sliding_window,
      " is not accepted; pass an int >= 1, or None");
  check(sinks, "sinks", kFloats, {heads});
  const auto dense = [](const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); };
  at::Tensor out = at::empty(query.sizes(), query.options());
  const at::Tensor bounds = cu_seqlens_q.contiguous();
  const auto run_as = [&](auto type) {
    run<decltype(type)>(
        out, dense(query), dense(key), dense(value), bounds, kv_ranges.contiguous(), scale,
        sliding_window, softcap, sinks);
  };
  switch (query.scalar_type()) {
    case at::kFloat: run_as(float()); break;
    case at::kDouble: run_as(double()); break;
    case at::kBFloat16: run_as(at::BFloat16()); break;
    case at::kHalf: run_as(at::Half()); break;
    default: TORCH_CHECK_TYPE(false, "query must be float32, bfloat16, float16 or float64, got ", query.scalar_type());
  }
  out.slice(0, bounds.const_data_ptr<int32_t>()[bounds.numel() - 1]).zero_();  // padding
  return out;
}

// Rows `slots` of `cache` [slots, heads, head_dim] = `rows` [N, heads, head_dim], byte by byte; negative: skipped.
void append(const at::Tensor& cache, const at::Tensor& rows, const at::Tensor& slots) {
  const int64_t *slot = slots.const_data_ptr<int64_t>(), count = slots.numel();
  const int64_t heads = cache.size(1), head_dim = cache.size(2), size = cache.element_size();
  const auto dense = [&](const at::Tensor& x) { return head_dim == 1 || x.stride(2) == 1; };
  // Out of the tensors once: their accessors cost as much as copying a head.
  const int64_t to_row = cache.stride(0) * size, to_head = cache.stride(1) * size, to_number = cache.stride(2) * size;
  const int64_t from_row = rows.stride(0) * size, from_head = rows.stride(1) * size;
  const int64_t from_number = rows.stride(2) * size;
  const int64_t run = dense(cache) && dense(rows) ? head_dim : 1;  // numbers copied together
  char* const to = static_cast<char*>(cache.data_ptr());
  const char* const from = static_cast<const char*>(rows.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, heads * head_dim * size));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (slot[i] < 0) continue;
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t d = 0; d < head_dim; d += run) {
          std::memcpy(
              to + slot[i] * to_row + head * to_head + d * to_number,
              from + i * from_row + head * from_head + d * from_number, run * size);
        }
      }
    }
  });
}

void kv_append(
    const at::Tensor& key_cache, const at::Tensor& value_cache, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& slots) {
  const at::ScalarType dtype = key_cache.scalar_type();
  check_shape(key_cache, "key_cache", {kAny, kAny, kAny});
  check(value_cache, "value_cache", dtype, key_cache.sizes());
  check(key, "key", dtype, {kAny, key_cache.size(1), key_cache.size(2)});
  check(value, "value", dtype, key.sizes());
  check(slots, "slots", at::kLong, {key.size(0)});
  const at::Tensor dense_slots = slots.contiguous();
  const int64_t *slot = dense_slots.const_data_ptr<int64_t>(), num_slots = key_cache.size(0);
  for (int64_t i = 0; i < slots.size(0); ++i) {
    TORCH_CHECK_VALUE(
        slot[i] < num_slots, "slots holds ", slot[i], ", accepted are slots below ", num_slots,
        ", the length of the cache, and negative ones for padding; make the cache longer");
  }
  append(key_cache, key, dense_slots);
  append(value_cache, value, dense_slots);
}

}  // namespace

TORCH_LIBRARY_IMPL(selfgen, CPU, m) {
  m.impl("kv_append", kv_append);
  m.impl("ragged_attention", ragged_attention);
}
