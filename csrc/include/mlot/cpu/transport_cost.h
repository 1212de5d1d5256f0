// Sinkhorn's iteration between two sequences of features, without the batch's cost matrices; see
// mlot_kernels/ops/transport_cost/README.md.
#pragma once

#include "mlot/cpu/pairwise_cost.h"
#include "mlot/cpu/sinkhorn.h"

namespace mlot {

// The options' rows are those of x, their columns those of y.
struct TransportCostForward {
  FeaturePairs pairs;
  TransportOptions options;
  TransportOutputs outputs;
};

struct TransportCostBackward {
  TransportUpstream upstream;
  FeaturePairs pairs;
  TransportOptions options;
  TransportSaved saved;
  void *grad_x, *grad_y;  // as the side, dense, written in full; null where it needs none
  TransportGradients gradients;
};

// For the accumulators float and double.
struct TransportCost {
  void (*forward[2])(const TransportCostForward&, const Parallel&);
  void (*backward[2])(const TransportCostBackward&, const Parallel&);
};

namespace baseline {
extern const TransportCost transport_cost;
}
namespace avx2 {
extern const TransportCost transport_cost;
}
namespace avx512 {
extern const TransportCost transport_cost;
}

}  // namespace mlot
