#include "mlot/cuda/soft_rank.h"

#include "common.h"
#include "mlot/torch/soft_rank.h"

namespace mlot::cuda {
namespace {

void check_width(const Tensor& values) {
  STD_TORCH_CHECK(values.dim() == 2 && values.size(1) <= kMostRanked, "values must be [N, n] with n of at most 4096");
}

std::tuple<Tensor, Tensor, Tensor> soft_rank_forward(const Tensor& values, const std::optional<Tensor>& lengths,
                                                     double epsilon) {
  const OnDevice on(values);
  check_width(values);
  const SoftRankMade made(values, lengths, epsilon);
  soft_rank.forward[dtype_index(values)](made.call, on.stream);
  return made.outputs();
}

Tensor soft_rank_backward(const Tensor& grad, const Tensor& values, const Tensor& order, const Tensor& block,
                          double epsilon) {
  const OnDevice on(values);
  check_width(values);
  const SoftRankGiven given(grad, values, order, block, epsilon);
  soft_rank.backward[dtype_index(values)](given.call, on.stream);
  return given.gradient;
}

}  // namespace
}  // namespace mlot::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cuda, library) {
  library.def(mlot::kSoftRankForward);
  library.def(mlot::kSoftRankBackward);
}

MLOT_CUDA_IMPLEMENTATIONS(library) {
  library.impl("soft_rank_forward", TORCH_BOX(&mlot::cuda::soft_rank_forward));
  library.impl("soft_rank_backward", TORCH_BOX(&mlot::cuda::soft_rank_backward));
}
