// The routines of mlot/cpu/probability_bins.h, one table per instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace mlot {

// `scale` is BinScale's peak, top and per_logit; `mask` is null where all columns are looked at.
template <class A>
struct BinRoutinesOf {
  int64_t (*bin_of)(A x, const A* scale);
  A (*upper_edge)(int64_t bin, const A* scale);
  void (*count_bins)(const A* x, const bool* mask, int64_t columns, const A* scale, uint32_t* counts);
  // `open` gets the logits of open bins where it is not null.
  void (*sum_bins)(const A* x, const bool* mask, int64_t columns, const A* scale, A factor, const A* weights,
                   double* total, double* moment, std::vector<A>* open);
};

struct BinRoutines {
  int64_t bins;  // how many there are
  double open;   // the weight of an open one
  BinRoutinesOf<float> of_float;
  BinRoutinesOf<double> of_double;
};

namespace baseline {
extern const BinRoutines bin_routines;
}
namespace avx2 {
extern const BinRoutines bin_routines;
}
namespace avx512 {
extern const BinRoutines bin_routines;
}

}  // namespace mlot
