// topk_softmax; see mlot_kernels/ops/topk_softmax/README.md. Backward is gradient_at_columns.h.
#pragma once

#include "mlot/cuda/logits.h"
#include "mlot/scalars.h"

namespace mlot::cuda {

// Outputs are written in full, zeros beyond the counted rows.
struct TopkSoftmaxForward {
  LogitsRows rows;
  int64_t k;                // 1 to the number of columns, below 2^32
  void* log_probabilities;  // [B, A, k]
  int64_t* columns;         // [B, A, k]
  void* lse;                // [B, A]
  SavedScalars<void*> saved;
  void* found;  // [B, A, k] of 16 bytes: room
};

// For float32, bfloat16, float16, float64.
struct TopkSoftmax {
  void (*forward[4])(const TopkSoftmaxForward&, void* stream);
};

extern const TopkSoftmax topk_softmax;

}  // namespace mlot::cuda
