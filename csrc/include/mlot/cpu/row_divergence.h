// A divergence of each pair of rows, and its gradient; see mlot_kernels/ops/row_divergence/README.md.
#pragma once

#include "mlot/cpu/logits.h"
#include "mlot/divergence.h"

namespace mlot {

// Student first, teacher second.
struct RowDivergenceForward {
  LogitsRows sides[2];  // of one temperature; of one vocab_size but with column_pairs
  DivergenceOptions options;
  void* loss;  // [B, A], in the wider accumulator
  DivergenceSaved<void*> saved[2];
  void *share, *target_log_total;
};

struct RowDivergenceBackward {
  LogitsRows sides[2];
  DivergenceOptions options;
  const void* grad[2];  // [B, A], dense, in the dtype of either side's accumulator
  DivergenceSaved<const void*> saved[2];
  const void *share, *target_log_total;
  void* grad_values[2];     // [B, T, width], dense; null: not needed
  void* grad_log_scale[2];  // [B, A]
};

// For float32, bfloat16, float16, float64: by the student's, then the teacher's.
struct RowDivergence {
  void (*forward[4][4])(const RowDivergenceForward&, const Parallel&);
  void (*backward[4][4])(const RowDivergenceBackward&, const Parallel&);
};

namespace baseline {
extern const RowDivergence row_divergence;
}
namespace avx2 {
extern const RowDivergence row_divergence;
}
namespace avx512 {
extern const RowDivergence row_divergence;
}

}  // namespace mlot
