// Costs between all pairs of feature vectors of two sides; see mlot_kernels/ops/pairwise_cost/README.md.
#pragma once

#include <cstdint>

#include "mlot/cpu/logits.h"
#include "mlot/cpu/metric.h"
#include "mlot/feature_rows.h"

namespace mlot {

struct FeaturePairs {
  FeatureRows x, y;
  int64_t problems, width;  // B, D
  Metric metric;
};

struct PairwiseCostForward {
  FeaturePairs pairs;
  void* cost;  // [B, M, N] of the accumulator, written in full
};

struct PairwiseCostBackward {
  FeaturePairs pairs;
  const void* grad;  // [B, M, N] of the accumulator, dense
  int64_t threads;
  void *grad_x, *grad_y;  // as the side, dense, written in full; null where it needs none
};

// For the accumulators float and double.
struct PairwiseCost {
  void (*forward[2])(const PairwiseCostForward&, const Parallel&);
  void (*backward[2])(const PairwiseCostBackward&, const Parallel&);
};

namespace baseline {
extern const PairwiseCost pairwise_cost;
}
namespace avx2 {
extern const PairwiseCost pairwise_cost;
}
namespace avx512 {
extern const PairwiseCost pairwise_cost;
}

}  // namespace mlot
