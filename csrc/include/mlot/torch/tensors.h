// What all doors to torch share, on its stable ABI. Arguments are checked in Python, where messages can name them; what
// stands in the doors are last guards for callers of torch.ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>

#include "mlot/scalars.h"

namespace mlot {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where a kernel of this dtype stands in the tables: float32, bfloat16, float16, float64.
inline int dtype_index(const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Float:
      return 0;
    case ScalarType::BFloat16:
      return 1;
    case ScalarType::Half:
      return 2;
    case ScalarType::Double:
      return 3;
    default:
      STD_TORCH_CHECK(false, "values must be float32, bfloat16, float16 or float64");
  }
}

// The dtype of sums over `values` and of a row's scalars.
inline ScalarType accumulator(const Tensor& values) {
  return values.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The wider of two sides', for what is summed over both.
inline ScalarType accumulator(const Tensor& one, const Tensor& other) {
  return accumulator(one) == ScalarType::Double ? ScalarType::Double : accumulator(other);
}

// `tensor` itself or a contiguous copy. For the small tensors, such as [B, A]; never for logits.
inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

// `tensor` in `dtype` and contiguous: a row's scalars, whatever the caller keeps them in.
inline Tensor dense(const Tensor& tensor, ScalarType dtype) { return dense(torch::stable::to(tensor, dtype)); }

// A [B, A] tensor, or none, in the dtype of the row's scalars.
inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor, ScalarType dtype) {
  return tensor ? std::optional(dense(*tensor, dtype)) : std::nullopt;
}

// A row operator's tensors, the small ones contiguous: index and log_scale [B, A], column_mask [V].
struct LogitsTensors {
  Tensor index;
  std::optional<Tensor> column_mask, log_scale;

  LogitsTensors(const Tensor& values, const Tensor& index_, const std::optional<Tensor>& column_mask_,
                const std::optional<Tensor>& log_scale_, int64_t vocab_size)
      : index(dense(index_)), log_scale(dense(log_scale_, accumulator(values))) {
    STD_TORCH_CHECK(values.dim() == 3, "values must be [B, T, V]");
    STD_TORCH_CHECK(values.size(2) <= 1 || values.stride(2) == 1, "the last dimension of values must be contiguous");
    STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= values.size(2), "vocab_size must be in 1..V");
    STD_TORCH_CHECK(index.dim() == 2 && index.size(0) == values.size(0), "index must be [B, A]");
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, "index must be int64");
    if (column_mask_) {
      column_mask = dense(*column_mask_);
      STD_TORCH_CHECK(column_mask->scalar_type() == ScalarType::Bool, "column_mask must be bool");
      STD_TORCH_CHECK(column_mask->dim() == 1 && column_mask->size(0) == values.size(2), "column_mask must be [V]");
    }
    STD_TORCH_CHECK(!log_scale || log_scale->numel() == index.numel(), "log_scale must be [B, A]");
  }
};

// The six saved scalars, dense in the accumulator's dtype.
using SavedTensors = std::array<Tensor, 6>;

inline SavedScalars<const void*> pointers(const SavedTensors& saved) {
  const auto at = [&](int i) { return saved[i].const_data_ptr(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

inline SavedScalars<void*> mutable_pointers(const SavedTensors& saved) {
  const auto at = [&](int i) { return saved[i].mutable_data_ptr(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

}  // namespace mlot
