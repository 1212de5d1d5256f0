// What the operators' doors to torch share. Arguments are checked in Python, where messages can name them; what stands
// here are last guards for callers of torch.ops.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "mlot/cpu/dispatch.h"
#include "mlot/cpu/logits.h"

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

// Asks for huge pages under a large fresh output, whose page faults cost several times its writes. Only a hint: where
// it fails, nothing changes but the time.
inline void* prefault_hint(const Tensor& output) {
  constexpr uintptr_t kWorthIt = 4u << 20, kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t bytes = uintptr_t(output.numel()) * output.element_size();
  if (bytes >= kWorthIt) {
    const uintptr_t first = (begin + kPage - 1) & ~(kPage - 1), last = (begin + bytes) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
  return reinterpret_cast<void*>(begin);
}

// How many rows are worth a thread's start.
inline int64_t grain(int64_t columns) {
  constexpr int64_t kElements = 32768;
  return kElements / (columns + 1) + 1;
}

// `tensor` itself or a contiguous copy. For the small tensors, such as [B, A]; never for logits.
inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

// `tensor` in `dtype` and contiguous: a row's scalars, whatever the caller keeps them in.
inline Tensor dense(const Tensor& tensor, ScalarType dtype) { return dense(torch::stable::to(tensor, dtype)); }

// A [B, A] tensor, or none, in the dtype of the row's scalars.
inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor, ScalarType dtype) {
  return tensor ? std::optional(dense(*tensor, dtype)) : std::nullopt;
}

// What a row operator's arguments become. Holds the contiguous copies that `view` points into; `index` and the others
// are [B, A], and small.
struct LogitsArguments {
  Tensor index;
  std::optional<Tensor> column_mask, log_scale;
  LogitsView view;

  LogitsArguments(const Tensor& values, const Tensor& index_, const std::optional<Tensor>& column_mask_,
                  const std::optional<Tensor>& log_scale_, double temperature, bool standardize, int64_t vocab_size)
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
    const auto* positions = static_cast<const int64_t*>(index.const_data_ptr());
    for (int64_t slot = 0; slot < index.numel(); ++slot) {
      STD_TORCH_CHECK(positions[slot] >= -1 && positions[slot] < values.size(1), "index must be in -1..T-1");
    }
    view = {values.const_data_ptr(),
            values.stride(0),
            values.stride(1),
            positions,
            index.size(1),
            vocab_size,
            column_mask ? static_cast<const bool*>(column_mask->const_data_ptr()) : nullptr,
            log_scale ? log_scale->const_data_ptr() : nullptr,
            temperature,
            standardize};
  }
};

// Zeros the rows of a contiguous `output` [B, T, V] that `index` does not name; the kernel writes the others. Apart
// from it, so that each of the two has rows of one cost for its threads.
inline void zero_uncounted_rows(const Tensor& output, const Tensor& index) {
  const int64_t positions = output.size(1), slots = index.size(1);
  const int64_t bytes = output.size(2) * output.element_size();
  std::vector<char> counted(output.size(0) * positions);
  const auto* where = static_cast<const int64_t*>(index.const_data_ptr());
  for (int64_t slot = 0; slot < index.numel(); ++slot) {
    if (where[slot] >= 0) counted[slot / slots * positions + where[slot]] = 1;
  }
  std::vector<int64_t> rest;
  for (size_t row = 0; row < counted.size(); ++row) {
    if (!counted[row]) rest.push_back(row);
  }
  if (rest.empty()) return;
  char* begin = static_cast<char*>(output.mutable_data_ptr());
  torch::stable::parallel_for(0, rest.size(), grain(output.size(2)), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memset(begin + rest[i] * bytes, 0, bytes);
  });
}

}  // namespace mlot
