// Entropy of every counted row's distribution, and its gradient. mlot_kernels/ops/row_entropy/README.md has the
// formulas.
#pragma once

#include <cstdint>

#include "mlot/cpu/logits.h"

namespace mlot {

// [B, A] each, in the accumulator's dtype; 0 beyond the counted rows. What backward needs of forward, and the result.
struct RowEntropyOutputs {
  void *entropy, *mass, *peak, *log_total, *mean, *scale, *slope, *moment;
};

// By dtype: float, bfloat16, float16, double.
struct RowEntropyKernels {
  // Writes the outputs of slots [first, last). Reads each of their rows once from memory; under `standardize` a second
  // time from the cache.
  void (*forward[4])(const LogitsView& logits, const RowEntropyOutputs& outputs, int64_t first, int64_t last);
  // Writes the rows of `grad_values`, a contiguous [B, T, V], that slots [first, last) name, and `grad_log_scale` [B,
  // A] at these slots. Reads each row once.
  void (*backward[4])(const LogitsView& logits, const RowEntropyOutputs& saved, const void* grad, void* grad_values,
                      int64_t positions, int64_t columns, void* grad_log_scale, int64_t first, int64_t last);
};

namespace baseline {
extern const RowEntropyKernels row_entropy;
}
namespace avx2 {
extern const RowEntropyKernels row_entropy;
}
namespace avx512 {
extern const RowEntropyKernels row_entropy;
}

}  // namespace mlot
