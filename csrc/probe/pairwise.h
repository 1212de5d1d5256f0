// mlot/cpu/pairwise.h, one table per instruction set.
#pragma once

#include <cstdint>

#include "mlot/cpu/metric.h"

namespace mlot {

// Features x [M, D] and y [N, D], dense.
template <class A>
struct FeatureTables {
  Metric metric;
  const A *x, *y;
  int64_t M, N, D;
};

template <class A>
struct PairwiseRoutinesOf {
  // Of rows [first, last) of x: costs [last - first, N], and the gradient [last - first, D] that weights
  // [last - first, N] pass on.
  void (*costs)(const FeatureTables<A>& features, int64_t first, int64_t last, A* out);
  void (*gradient)(const FeatureTables<A>& features, int64_t first, int64_t last, const A* weights, A* out);
};

struct PairwiseRoutines {
  PairwiseRoutinesOf<float> of_float;
  PairwiseRoutinesOf<double> of_double;
};

namespace baseline {
extern const PairwiseRoutines pairwise_routines;
}
namespace avx2 {
extern const PairwiseRoutines pairwise_routines;
}
namespace avx512 {
extern const PairwiseRoutines pairwise_routines;
}

}  // namespace mlot
