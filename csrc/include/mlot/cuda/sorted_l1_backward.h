// The launcher of sorted_l1's backward.
#pragma once

#include "mlot/cuda/sorted_l1.h"

namespace mlot::cuda {

// Of a side of Own, and the other one.
template <class Own, class Other>
void launch_sorted_l1_backward(const SortedL1Backward& call, void* stream);

}  // namespace mlot::cuda
