// What kernels ask of tensors before they trust a size. Python checks the same with better words, but the operators can
// be called without it, and a size that nobody compared is a read past the end.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kAny = -1;  // of a shape: any size
constexpr at::ScalarType kIntegers[] = {at::kLong, at::kInt};
constexpr at::ScalarType kFloats[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};

inline void check_dtype(const at::Tensor& x, const char* name, at::ArrayRef<at::ScalarType> dtypes) {
  TORCH_CHECK_TYPE(
      std::find(dtypes.begin(), dtypes.end(), x.scalar_type()) != dtypes.end(), name, " has dtype ", x.scalar_type(),
      ", accepted are ", dtypes, "; convert it with .to(dtype)");
}

inline void check_shape(const at::Tensor& x, const char* name, at::IntArrayRef shape) {
  bool fits = x.dim() == int64_t(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny || shape[i] == x.size(i);
  TORCH_CHECK_VALUE(
      fits, name, " has shape ", x.sizes(), ", expected ", shape,
      ", where -1 is any size; reshape or re-select its rows");
}

inline void check(
    const at::Tensor& x, const char* name, at::ArrayRef<at::ScalarType> dtypes, at::IntArrayRef shape) {
  check_dtype(x, name, dtypes);
  check_shape(x, name, shape);
}

inline void check(
    const OptionalTensor& x, const char* name, at::ArrayRef<at::ScalarType> dtypes, at::IntArrayRef shape) {
  if (x) check(*x, name, dtypes, shape);
}

// The two tensors that name the random numbers of `rows` rows.
inline void check_keys(const at::Tensor& sample_ids, const at::Tensor& positions, int64_t rows) {
  check(sample_ids, "sample_ids", kIntegers, {rows});
  check(positions, "positions", kIntegers, {rows});
}

inline void check_vocabulary(int64_t size) {
  TORCH_CHECK_VALUE(size > 0, "the vocabulary is empty (V = 0); pass logits or weight with V >= 1");
}

}  // namespace
