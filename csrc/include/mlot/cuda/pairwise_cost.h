// L1 costs between all pairs of feature vectors of two sides, and their gradient; see
// mlot_kernels/ops/pairwise_cost/README.md.
#pragma once

#include "mlot/feature_rows.h"

namespace mlot::cuda {

// Both sides in one dtype, their columns neighbours; sums in its accumulator.
struct PairwiseCostForward {
  FeatureRows x, y;
  int64_t problems, width;  // B, D
  void* cost;               // [B, M, N] in the accumulator's dtype, written in full
};

// Of one side, `own`. The pair of its row i and the other's row j weighs grad[i * own_stride + j * other_stride] of
// each problem's [M, N].
struct PairwiseCostBackward {
  FeatureRows own, other;
  int64_t problems, width;
  const void* grad;  // [B, M, N] in the accumulator's dtype, dense
  int64_t own_stride, other_stride;
  void* parts;     // [parts, B, rows, D] in the accumulator's dtype: room, where there are several
  void* gradient;  // [B, rows, D] in the side's dtype, written in full
};

// For float32, bfloat16, float16, float64.
struct PairwiseCost {
  void (*forward[4])(const PairwiseCostForward&, void* stream);
};

// `parts`: in how many parts of the other side's rows the gradient of `rows` rows is summed. It depends on these sizes
// alone, never on how many problems there are: it decides the order of sums.
struct PairwiseCostGradient {
  void (*backward[4])(const PairwiseCostBackward&, void* stream);
  int64_t (*parts[4])(int64_t rows, int64_t others, int64_t width);
};

extern const PairwiseCost pairwise_cost;
extern const PairwiseCostGradient pairwise_cost_gradient;

}  // namespace mlot::cuda
