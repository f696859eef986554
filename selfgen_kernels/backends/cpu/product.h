// Matrix products with the rows of one factor in vector lanes, which no sum ever crosses: c = a b, where a is read in
// place one number at a time and b and c are whole vectors. A lane's result does not depend on the other lanes.

#pragma once

#include "elementary.h"

#include <cstdint>
#include <type_traits>

namespace {

constexpr int64_t kVectors = 3;  // of c side by side, at most: with 8 rows of them 24 sums, which 32 registers hold

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ROWS rows of c [., V vectors] = c * factor + a b, with a [ROWS, inner] at a[row * a_row + j * a_inner]. No factor: 0.
template <int64_t ROWS, int64_t V, typename Vec, typename Real>
SELFGEN_INLINE void multiply_rows(
    Vec* c, const Real* a, int64_t a_row, int64_t a_inner, const Vec* b, int64_t inner, const Vec* factor) {
  Vec sum[ROWS][V];
#pragma GCC unroll 8
  for (int64_t row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) sum[row][v] = Vec{};
  }
  for (int64_t j = 0; j < inner; ++j) {
#pragma GCC unroll 8
    for (int64_t row = 0; row < ROWS; ++row) {
      const Real x = a[row * a_row + j * a_inner];
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) sum[row][v] += x * b[j * V + v];
    }
  }
#pragma GCC unroll 8
  for (int64_t row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) c[row * V + v] = factor ? c[row * V + v] * factor[v] + sum[row][v] : sum[row][v];
  }
}

// The same for any number of rows: as many ROWS at a time as there are, then half as many, ...
template <int64_t ROWS, int64_t V, typename Vec, typename Real>
SELFGEN_INLINE void multiply(
    Vec* c, int64_t rows, const Real* a, int64_t a_row, int64_t a_inner, const Vec* b, int64_t inner,
    const Vec* factor) {
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) {
    multiply_rows<ROWS, V>(c + row * V, a + row * a_row, a_row, a_inner, b, inner, factor);
  }
  if constexpr (ROWS > 1) {
    if (row < rows) {
      multiply<ROWS / 2, V>(c + row * V, rows - row, a + row * a_row, a_row, a_inner, b, inner, factor);
    }
  }
}

// Functions of one level of x86, chosen when they are first needed; vectors are as long as its registers.
#if SELFGEN_X86_LEVELS
#define SELFGEN_LEVEL(names) __attribute__((target(names), optimize("fp-contract=fast")))
#endif

}  // namespace
