// What the operators' doors to torch share on a GPU: the tensors' device, its current stream, and logits in its memory.
//
// Compiled with MLOT_ON_HOST, for tests, the operators take tensors of the CPU.
#pragma once

#include "mlot/cuda/logits.h"
#include "mlot/torch/tensors.h"
#ifndef MLOT_ON_HOST
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace mlot {

// While it lives, the tensor's device is the current one. `stream` is that device's current stream.
struct OnDevice {
#ifdef MLOT_ON_HOST
  void* stream = nullptr;
  explicit OnDevice(const Tensor&) {}
#else
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
#endif
};

namespace cuda {

// What a row operator's arguments become. Holds the contiguous copies that `rows` points into.
struct LogitsArguments : LogitsTensors {
  LogitsRows rows;

  LogitsArguments(const Tensor& values, const Tensor& index_, const std::optional<Tensor>& column_mask_,
                  const std::optional<Tensor>& log_scale_, double temperature, bool standardize, int64_t vocab_size)
      : LogitsTensors(values, index_, column_mask_, log_scale_, vocab_size) {
    rows = {.values = values.const_data_ptr(),
            .batch_stride = values.stride(0),
            .row_stride = values.stride(1),
            .sequences = values.size(0),
            .positions = values.size(1),
            .width = values.size(2),
            .index = static_cast<const int64_t*>(index.const_data_ptr()),
            .slots = index.size(1),
            .vocab_size = vocab_size,
            .column_mask = column_mask ? static_cast<const bool*>(column_mask->const_data_ptr()) : nullptr,
            .log_scale = log_scale ? log_scale->const_data_ptr() : nullptr,
            .temperature = temperature,
            .standardize = standardize};
  }

  LogitsArguments(const LogitsArguments&) = delete;  // `rows` points into its members
};

}  // namespace cuda
}  // namespace mlot

#ifdef MLOT_ON_HOST
#define MLOT_CUDA_IMPLEMENTATIONS(library) STABLE_TORCH_LIBRARY_IMPL(mlot_cuda, CPU, library)
#else
#define MLOT_CUDA_IMPLEMENTATIONS(library) STABLE_TORCH_LIBRARY_IMPL(mlot_cuda, CUDA, library)
#endif
