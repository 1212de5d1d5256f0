// What the doors of the transport operators share on a CPU.
#pragma once

#include "common.h"
#include "mlot/cpu/sinkhorn.h"
#include "mlot/torch/transport.h"

namespace mlot {

// The kernels index the histories with them.
inline void check_steps(const Tensor& done, const TransportOptions& options) {
  const auto* steps = static_cast<const int64_t*>(done.const_data_ptr());
  for (int64_t b = 0; b < options.problems; ++b) {
    STD_TORCH_CHECK(steps[b] >= 1 && steps[b] <= options.iterations, "done must be in 1..L");
  }
}

}  // namespace mlot
