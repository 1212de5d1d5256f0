// What the operators' doors to torch share. Arguments are checked in Python, where messages can name them; what stands
// here are last guards for callers of torch.ops.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
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

// The wider of two sides', for what is summed over both.
inline ScalarType accumulator(const Tensor& one, const Tensor& other) {
  return accumulator(one) == ScalarType::Double ? ScalarType::Double : accumulator(other);
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

// The gradient of one side, like its values; empty, and null for the kernel, where the side needs none.
struct SideGradient {
  Tensor tensor;
  void* written;

  SideGradient(const Tensor& values, bool needed)
      : tensor(needed ? torch::stable::new_empty(values, values.sizes()) : torch::stable::new_empty(values, {0})),
        written(needed ? prefault_hint(tensor) : nullptr) {}
};

// Shares work among torch's threads.
inline Parallel threads() {
  return [](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (n > 0) torch::stable::parallel_for(0, n, grain, [&](int64_t first, int64_t last) { body(first, last); });
  };
}

// `tensor` itself or a contiguous copy. For the small tensors, such as [B, A]; never for logits.
inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

// `tensor` in `dtype` and contiguous: a row's scalars, whatever the caller keeps them in.
inline Tensor dense(const Tensor& tensor, ScalarType dtype) { return dense(torch::stable::to(tensor, dtype)); }

// A [B, A] tensor, or none, in the dtype of the row's scalars.
inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor, ScalarType dtype) {
  return tensor ? std::optional(dense(*tensor, dtype)) : std::nullopt;
}

// What a row operator's arguments become. Holds the contiguous copies that `rows` points into; `index` and the others
// are [B, A], and small.
struct LogitsArguments {
  Tensor index;
  std::optional<Tensor> column_mask, log_scale;
  std::vector<double> temperatures;
  LogitsRows rows;

  LogitsArguments(const Tensor& values, const Tensor& index_, const std::optional<Tensor>& column_mask_,
                  const std::optional<Tensor>& log_scale_, std::vector<double> temperatures_, bool standardize,
                  int64_t vocab_size)
      : index(dense(index_)),
        log_scale(dense(log_scale_, accumulator(values))),
        temperatures(std::move(temperatures_)) {
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
    STD_TORCH_CHECK(!temperatures.empty(), "temperatures must have at least one");
    const auto* positions = static_cast<const int64_t*>(index.const_data_ptr());
    for (int64_t slot = 0; slot < index.numel(); ++slot) {
      STD_TORCH_CHECK(positions[slot] >= -1 && positions[slot] < values.size(1), "index must be in -1..T-1");
    }
    rows = {.values = values.const_data_ptr(),
            .batch_stride = values.stride(0),
            .row_stride = values.stride(1),
            .sequences = values.size(0),
            .positions = values.size(1),
            .width = values.size(2),
            .index = positions,
            .slots = index.size(1),
            .vocab_size = vocab_size,
            .column_mask = column_mask ? static_cast<const bool*>(column_mask->const_data_ptr()) : nullptr,
            .log_scale = log_scale ? log_scale->const_data_ptr() : nullptr,
            .standardize = standardize,
            .temperatures = temperatures.data(),
            .temperature_count = int64_t(temperatures.size())};
  }

  LogitsArguments(const LogitsArguments&) = delete;  // `rows` points into its members
};

// The six saved scalars, dense in the accumulator's dtype.
using SavedTensors = std::array<Tensor, 6>;

inline SavedScalars<const void*> pointers(const SavedTensors& saved) {
  const auto at = [&](int i) { return saved[i].const_data_ptr(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

}  // namespace mlot
