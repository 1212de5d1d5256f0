// The k largest log-probabilities of every row, and the log of its normaliser; see
// mlot_kernels/ops/topk_softmax/README.md.
#pragma once

#include "mlot/cpu/logits.h"

namespace mlot {

// Outputs are written in full, zeros beyond the counted rows.
struct TopkSoftmaxForward {
  LogitsRows rows;  // of one temperature
  int64_t k;
  void* log_probabilities;  // [B, A, k]
  int64_t* columns;         // [B, A, k]
  void* lse;                // [B, A]
  SavedScalars<void*> saved;
};

struct TopkSoftmaxBackward {
  LogitsRows rows;
  int64_t k;
  const void* grad_log_probabilities;  // [B, A, k], dense
  const void* grad_lse;                // [B, A], dense
  const int64_t* columns;              // [B, A, k]
  SavedScalars<const void*> saved;
  void* grad_values;     // [B, T, width], dense
  void* grad_log_scale;  // [B, A]
};

// For float32, bfloat16, float16, float64.
struct TopkSoftmax {
  void (*forward[4])(const TopkSoftmaxForward&, const Parallel&);
  void (*backward[4])(const TopkSoftmaxBackward&, const Parallel&);
};

namespace baseline {
extern const TopkSoftmax topk_softmax;
}
namespace avx2 {
extern const TopkSoftmax topk_softmax;
}
namespace avx512 {
extern const TopkSoftmax topk_softmax;
}

}  // namespace mlot
