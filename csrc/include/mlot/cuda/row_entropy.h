// Entropy of every counted row's distribution, and its gradient; see mlot_kernels/ops/row_entropy/README.md.
#pragma once

#include "mlot/cuda/logits.h"
#include "mlot/scalars.h"

namespace mlot::cuda {

struct RowEntropyForward {
  LogitsRows rows;
  RowEntropyScalars<void*> made;
};

struct RowEntropyBackward {
  LogitsRows rows;
  const void* grad;  // [B, A], dense
  RowEntropyScalars<const void*> saved;
  void* grad_values;     // [B, T, width], dense
  void* grad_log_scale;  // [B, A]
  int32_t* slot_of;      // [B, T]: room for the slot that counts each row
};

// For float32, bfloat16, float16, float64.
struct RowEntropy {
  void (*forward[4])(const RowEntropyForward&, void* stream);
  void (*backward[4])(const RowEntropyBackward&, void* stream);
};

extern const RowEntropy row_entropy;

}  // namespace mlot::cuda
