#include "mlot/torch/soft_rank.h"

#include "common.h"
#include "mlot/cpu/soft_rank.h"

namespace mlot {
namespace {

std::tuple<Tensor, Tensor, Tensor> soft_rank_forward(const Tensor& values, const std::optional<Tensor>& lengths,
                                                     double epsilon) {
  const SoftRankMade made(values, lengths, epsilon);
  for (const Tensor& output : {made.ranks, made.order, made.block}) prefault_hint(output);
  MLOT_SELECT(soft_rank).forward[dtype_index(values)](made.call, threads());
  return made.outputs();
}

Tensor soft_rank_backward(const Tensor& grad, const Tensor& values, const Tensor& order, const Tensor& block,
                          double epsilon) {
  const SoftRankGiven given(grad, values, order, block, epsilon);
  prefault_hint(given.gradient);
  MLOT_SELECT(soft_rank).backward[dtype_index(values)](given.call, threads());
  return given.gradient;
}

}  // namespace
}  // namespace mlot

STABLE_TORCH_LIBRARY_FRAGMENT(mlot_cpu, library) {
  library.def(mlot::kSoftRankForward);
  library.def(mlot::kSoftRankBackward);
}

STABLE_TORCH_LIBRARY_IMPL(mlot_cpu, CPU, library) {
  library.impl("soft_rank_forward", TORCH_BOX(&mlot::soft_rank_forward));
  library.impl("soft_rank_backward", TORCH_BOX(&mlot::soft_rank_backward));
}
