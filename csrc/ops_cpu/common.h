// What the operators' doors to torch share on a CPU.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "mlot/cpu/dispatch.h"
#include "mlot/cpu/logits.h"
#include "mlot/torch/tensors.h"

namespace mlot {

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

// What a row operator's arguments become. Holds the contiguous copies that `rows` points into.
struct LogitsArguments : LogitsTensors {
  std::vector<double> temperatures;
  LogitsRows rows;

  LogitsArguments(const Tensor& values, const Tensor& index_, const std::optional<Tensor>& column_mask_,
                  const std::optional<Tensor>& log_scale_, std::vector<double> temperatures_, bool standardize,
                  int64_t vocab_size)
      : LogitsTensors(values, index_, column_mask_, log_scale_, vocab_size), temperatures(std::move(temperatures_)) {
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

}  // namespace mlot
