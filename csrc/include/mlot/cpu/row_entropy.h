// Entropy of every counted row's distribution, and its gradient; see mlot_kernels/ops/row_entropy/README.md.
#pragma once

#include "mlot/cpu/logits.h"

namespace mlot {

struct RowEntropyForward {
  LogitsRows rows;  // of one temperature
  RowEntropyScalars<void*> made;
};

struct RowEntropyBackward {
  LogitsRows rows;
  const void* grad;  // [B, A], dense
  RowEntropyScalars<const void*> saved;
  void* grad_values;     // [B, T, width], dense
  void* grad_log_scale;  // [B, A]
};

// For float32, bfloat16, float16, float64.
struct RowEntropy {
  void (*forward[4])(const RowEntropyForward&, const Parallel&);
  void (*backward[4])(const RowEntropyBackward&, const Parallel&);
};

namespace baseline {
extern const RowEntropy row_entropy;
}
namespace avx2 {
extern const RowEntropy row_entropy;
}
namespace avx512 {
extern const RowEntropy row_entropy;
}

}  // namespace mlot
