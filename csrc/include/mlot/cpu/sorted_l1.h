// The L1 distance of two rows of probabilities, each in descending order, and its gradient; see
// mlot_kernels/ops/sorted_l1/README.md.
#pragma once

#include "mlot/cpu/logits.h"
#include "mlot/sorted_l1.h"

namespace mlot {

// Outputs are written in full. Side 0 is the student, side 1 the teacher.
struct SortedL1Forward {
  LogitsRows sides[2];
  SortedL1Options options;
  void* loss;  // [B, A], in the wider of the two accumulators' dtypes
  SortedL1Saved<void*> saved[2];
};

struct SortedL1Backward {
  LogitsRows sides[2];
  SortedL1Options options;
  const void* grad[2];  // [B, A], the same in each side's accumulator's dtype
  SortedL1Saved<const void*> saved[2];
  void* grad_values[2];     // [B, T, width], dense; null where it is not needed
  void* grad_log_scale[2];  // [B, A]
};

// By the dtypes of student and teacher, each one of float32, bfloat16, float16, float64.
struct SortedL1 {
  void (*forward[4][4])(const SortedL1Forward&, const Parallel&);
  void (*backward[4][4])(const SortedL1Backward&, const Parallel&);
};

namespace baseline {
extern const SortedL1 sorted_l1;
}
namespace avx2 {
extern const SortedL1 sorted_l1;
}
namespace avx512 {
extern const SortedL1 sorted_l1;
}

}  // namespace mlot
