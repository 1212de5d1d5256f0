// What the doors of topk_softmax share: schemas, last guards, outputs.
#pragma once

#include <tuple>

#include "mlot/torch/tensors.h"

namespace mlot {

constexpr const char* kTopkSoftmaxForward =
    "topk_softmax_forward(Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, float temperature, "
    "bool standardize, int vocab_size, int k) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kTopkSoftmaxBackward =
    "topk_softmax_backward(Tensor grad_log_probabilities, Tensor grad_lse, Tensor values, Tensor index, "
    "Tensor? column_mask, Tensor columns, Tensor peak, Tensor log_total, Tensor expected, Tensor mean, Tensor scale, "
    "Tensor slope, float temperature, int vocab_size) -> (Tensor, Tensor)";

using TopkSoftmaxOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Forward's outputs.
struct TopkSoftmaxMade {
  Tensor log_probabilities, columns, lse;
  SavedTensors saved;

  TopkSoftmaxMade(const Tensor& values, const Tensor& index, int64_t vocab_size, int64_t k)
      : log_probabilities(torch::stable::new_empty(values, {index.size(0), index.size(1), k}, accumulator(values))),
        columns(torch::stable::new_empty(values, {index.size(0), index.size(1), k}, ScalarType::Long)),
        lse(of_rows(values, index)),
        saved{of_rows(values, index), of_rows(values, index), of_rows(values, index),
              of_rows(values, index), of_rows(values, index), of_rows(values, index)} {
    STD_TORCH_CHECK(k >= 1 && k <= vocab_size, "k must be in 1..vocab_size");
    STD_TORCH_CHECK(vocab_size < int64_t(1) << 32, "at most 2^32 - 1 columns");
  }

  TopkSoftmaxOutputs outputs() const {
    const auto& [log_total, expected, peak, mean, scale, slope] = saved;
    return {log_probabilities, columns, lse, peak, log_total, expected, mean, scale, slope};
  }

 private:
  static Tensor of_rows(const Tensor& values, const Tensor& index) {
    return torch::stable::new_empty(values, index.sizes(), accumulator(values));
  }
};

// Backward's tensors but for the logits, contiguous, and its outputs.
struct TopkSoftmaxGiven {
  Tensor columns;
  int64_t k;
  Tensor grad_log_probabilities, grad_lse;
  SavedTensors saved;
  Tensor grad_values, grad_log_scale;

  TopkSoftmaxGiven(const Tensor& grad_log_probabilities_, const Tensor& grad_lse_, const Tensor& values,
                   const Tensor& index, const Tensor& columns_, const Tensor& peak, const Tensor& log_total,
                   const Tensor& expected, const Tensor& mean, const Tensor& scale, const Tensor& slope)
      : columns(dense(columns_)),
        k(columns.dim() == 3 ? columns.size(2) : 0),
        grad_log_probabilities(dense(grad_log_probabilities_, accumulator(values))),
        grad_lse(of_rows(grad_lse_, values, index)),
        saved{of_rows(log_total, values, index), of_rows(expected, values, index), of_rows(peak, values, index),
              of_rows(mean, values, index),      of_rows(scale, values, index),    of_rows(slope, values, index)},
        grad_values(torch::stable::new_empty(values, values.sizes())),
        grad_log_scale(torch::stable::new_empty(values, index.sizes(), accumulator(values))) {
    STD_TORCH_CHECK(columns.dim() == 3 && columns.numel() == index.numel() * k, "columns must be [B, A, k]");
    STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Long, "columns must be int64");
    STD_TORCH_CHECK(grad_log_probabilities.numel() == columns.numel(), "grad_log_probabilities must be [B, A, k]");
  }

 private:
  static Tensor of_rows(const Tensor& tensor, const Tensor& values, const Tensor& index) {
    STD_TORCH_CHECK(tensor.numel() == index.numel(), "grad_lse and what forward saved must be [B, A]");
    return dense(tensor, accumulator(values));
  }
};

}  // namespace mlot
