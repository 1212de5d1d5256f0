// The kernels of topk_softmax, one table per instruction set.
#pragma once

#include <cstdint>

#include "mlot/cpu/logits.h"

namespace mlot {

// Row scalars that forward leaves for backward, [B, A] each, in the accumulator's dtype.
struct TopkSoftmaxScalars {
  void *peak, *log_total, *expected, *mean, *scale, *slope;
};

struct TopkSoftmaxOutputs {
  void* log_probabilities;  // [B, A, k]
  int64_t* columns;         // [B, A, k]
  void* lse;                // [B, A]
  TopkSoftmaxScalars scalars;
};

struct TopkSoftmaxGradients {
  const void* log_probabilities;  // [B, A, k], upstream
  const void* lse;                // [B, A], upstream
  const int64_t* columns;         // [B, A, k]
  TopkSoftmaxScalars scalars;
  void* values;         // [B, T, V], contiguous; only the rows that count are written
  int64_t positions;    // T
  int64_t width;        // V
  void* log_scale;      // [B, A]
};

// By dtype of the logits: float, bfloat16, float16, double. Each call works on slots [first, last) of [B, A].
struct TopkSoftmaxKernels {
  void (*forward[4])(const LogitsView& logits, int64_t k, const TopkSoftmaxOutputs& outputs, int64_t first,
                     int64_t last);
  void (*backward[4])(const LogitsView& logits, int64_t k, const TopkSoftmaxGradients& gradients, int64_t first,
                      int64_t last);
};

namespace baseline {
extern const TopkSoftmaxKernels topk_softmax;
}
namespace avx2 {
extern const TopkSoftmaxKernels topk_softmax;
}
namespace avx512 {
extern const TopkSoftmaxKernels topk_softmax;
}

}  // namespace mlot
