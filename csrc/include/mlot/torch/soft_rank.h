// What the doors of soft_rank share: schemas, last guards, outputs.
#pragma once

#include <limits>
#include <tuple>

#include "mlot/soft_rank.h"
#include "mlot/torch/tensors.h"

namespace mlot {

constexpr const char* kSoftRankForward =
    "soft_rank_forward(Tensor values, Tensor? lengths, float epsilon) -> (Tensor, Tensor, Tensor)";
constexpr const char* kSoftRankBackward =
    "soft_rank_backward(Tensor grad, Tensor values, Tensor order, Tensor block, float epsilon) -> Tensor";

// Forward's outputs, and its lengths, contiguous.
struct SoftRankMade {
  std::optional<Tensor> lengths;
  Tensor ranks, order, block;
  SoftRankForward call;

  SoftRankMade(const Tensor& values, const std::optional<Tensor>& lengths_, double epsilon)
      : lengths(lengths_ ? std::optional(dense(*lengths_)) : std::nullopt),
        ranks(torch::stable::new_empty(values, values.sizes(), accumulator(values))),
        order(torch::stable::new_empty(values, values.sizes(), ScalarType::Int)),
        block(torch::stable::new_empty(values, values.sizes(), ScalarType::Int)) {
    STD_TORCH_CHECK(values.dim() == 2, "values must be [N, n]");
    STD_TORCH_CHECK(values.size(1) <= 1 || values.stride(1) == 1, "the last dimension of values must be contiguous");
    STD_TORCH_CHECK(values.size(1) < std::numeric_limits<int32_t>::max(), "at most 2^31 - 2 columns");
    STD_TORCH_CHECK(!lengths || (lengths->scalar_type() == ScalarType::Long && lengths->numel() == values.size(0)),
                    "lengths must be int64 [N]");
    call = {.values = values.const_data_ptr(),
            .row_stride = values.stride(0),
            .rows = values.size(0),
            .width = values.size(1),
            .lengths = lengths ? static_cast<const int64_t*>(lengths->const_data_ptr()) : nullptr,
            .epsilon = epsilon,
            .ranks = ranks.mutable_data_ptr(),
            .order = static_cast<int32_t*>(order.mutable_data_ptr()),
            .block = static_cast<int32_t*>(block.mutable_data_ptr())};
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {ranks, order, block}; }
};

// Backward's tensors, contiguous, and its output.
struct SoftRankGiven {
  Tensor grad, order, block, gradient;
  SoftRankBackward call;

  SoftRankGiven(const Tensor& grad_, const Tensor& values, const Tensor& order_, const Tensor& block_, double epsilon)
      : grad(dense(grad_, accumulator(values))),
        order(dense(order_)),
        block(dense(block_)),
        gradient(torch::stable::new_empty(values, values.sizes())) {
    STD_TORCH_CHECK(values.dim() == 2 && grad.numel() == values.numel(), "values and grad must be [N, n]");
    STD_TORCH_CHECK(order.scalar_type() == ScalarType::Int && order.numel() == values.numel() &&
                        block.scalar_type() == ScalarType::Int && block.numel() == values.numel(),
                    "order and block must be int32 [N, n]");
    call = {.grad = grad.const_data_ptr(),
            .rows = values.size(0),
            .width = values.size(1),
            .order = static_cast<const int32_t*>(order.const_data_ptr()),
            .block = static_cast<const int32_t*>(block.const_data_ptr()),
            .epsilon = epsilon,
            .gradient = gradient.mutable_data_ptr()};
  }
};

}  // namespace mlot
