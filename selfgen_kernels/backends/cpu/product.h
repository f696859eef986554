// Matrix products with the rows of one factor in vector lanes, which no sum ever crosses: c = a b, where a is read in
// place one number at a time and b and c are whole vectors. A lane's result does not depend on the other lanes.

#pragma once

#include "elementary.h"

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

namespace {

constexpr int64_t kVectors = 3;  // of c side by side, at most: with 8 rows of them 24 sums, which 32 registers hold

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A matrix in memory: row i begins at data + i * stride.
template <typename Real>
struct Matrix {
  Real* data;
  int64_t stride;
  Matrix from(int64_t row) const { return {data + row * stride, stride}; }
};

// sum += x b
template <typename Vec, typename Real>
SELFGEN_INLINE void add_product(Vec& sum, Real x, const Vec& b) {
  sum += x * b;
}

// Two numbers of consecutive columns of a, or of consecutive rows of b: a lane's two products are added in one step.
struct Pair {
  c10::BFloat16 first, second;
};
#if SELFGEN_X86_BF16
// Written as assembly, as an intrinsic is not inlined into a function that is of no level yet. Subnormal numbers count
// as 0, as they do in the products of oneDNN.
template <typename Vec>
SELFGEN_INLINE void add_product(Vec& sum, Pair x, const Vec& b) {
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vec)), may_alias));
  const Bits pairs = Bits{} + bit_cast<int32_t>(x);
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(pairs));
}
#endif

// ROWS rows of c = c * factor + a b; c, b and factor have rows of V vectors, a [ROWS, inner] columns a_inner apart. With
// no factor, c = a b. Number is Real or, in a and b, Pair.
template <int64_t ROWS, int64_t V, typename Vec, typename Real, typename Number = Real>
SELFGEN_INLINE void multiply_rows(
    Matrix<Real> c, Matrix<const Number> a, int64_t a_inner, Matrix<const Number> b, int64_t inner,
    Matrix<const Real> factor) {
  constexpr int64_t LANES = sizeof(Vec) / sizeof(Real);
  Vec sum[ROWS][V];
#pragma GCC unroll 8
  for (int64_t row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) sum[row][v] = Vec{};
  }
  for (int64_t j = 0; j < inner; ++j) {
#pragma GCC unroll 8
    for (int64_t row = 0; row < ROWS; ++row) {
      const Number x = a.data[row * a.stride + j * a_inner];
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) add_product(sum[row][v], x, *(const Vec*)(b.data + j * b.stride + v * LANES));
    }
  }
#pragma GCC unroll 8
  for (int64_t row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) {
      Vec* const to = (Vec*)(c.data + row * c.stride + v * LANES);
      *to = factor.data ? *to * *(const Vec*)(factor.data + row * factor.stride + v * LANES) + sum[row][v] : sum[row][v];
    }
  }
}

// The same for any number of rows: as many ROWS at a time as there are, then fewer.
template <int64_t ROWS, int64_t V, typename Vec, typename Real, typename Number = Real>
SELFGEN_INLINE void multiply(
    Matrix<Real> c, int64_t rows, Matrix<const Number> a, int64_t a_inner, Matrix<const Number> b, int64_t inner,
    Matrix<const Real> factor) {
  const auto from = [&](int64_t row) { return factor.data ? factor.from(row) : factor; };
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) {
    multiply_rows<ROWS, V, Vec>(c.from(row), a.from(row), a_inner, b, inner, from(row));
  }
  if constexpr (ROWS > 1) {
    constexpr int64_t FEWER = ROWS > 4 ? ROWS / 2 : ROWS - 1;
    if (row < rows) multiply<FEWER, V, Vec>(c.from(row), rows - row, a.from(row), a_inner, b, inner, from(row));
  }
}

}  // namespace
