// Sinkhorn's iteration on a batch of cost matrices, and its gradient; see mlot_kernels/ops/sinkhorn/README.md.
#pragma once

#include "mlot/cpu/logits.h"
#include "mlot/transport.h"

namespace mlot {

// For float32, bfloat16, float16, float64. What the histories hold means something to the backward of the same
// instruction set alone: a problem in the log domain keeps F / log 2 and G / log 2 of each step, one on scalings u and
// v in the coordinates of the kernel that the step was made with, which for step 1 are 1. Steps that a problem did not
// take, and what does not count, are 0.
struct Sinkhorn {
  void (*forward[4])(const SinkhornForward&, const Parallel&);
  void (*backward[4])(const SinkhornBackward&, const Parallel&);
};

namespace baseline {
extern const Sinkhorn sinkhorn;
}
namespace avx2 {
extern const Sinkhorn sinkhorn;
}
namespace avx512 {
extern const Sinkhorn sinkhorn;
}

}  // namespace mlot
