// Soft ranks of the entries of rows, and their gradient; see mlot_kernels/ops/soft_rank/README.md.
#pragma once

#include "mlot/cpu/logits.h"
#include "mlot/soft_rank.h"

namespace mlot {

// For float32, bfloat16, float16, float64. A call owns all rows; a thread owns whole ones, whose results depend on
// themselves and on the width alone.
struct SoftRank {
  void (*forward[4])(const SoftRankForward&, const Parallel&);
  void (*backward[4])(const SoftRankBackward&, const Parallel&);
};

namespace baseline {
extern const SoftRank soft_rank;
}
namespace avx2 {
extern const SoftRank soft_rank;
}
namespace avx512 {
extern const SoftRank soft_rank;
}

}  // namespace mlot
