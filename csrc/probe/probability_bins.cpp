#include "mlot/cpu/probability_bins.h"

#include "probability_bins.h"

namespace mlot::MLOT_ISA {
namespace {

template <class A>
BinScale<A> scale_of(const A* scale) {
  return {scale[0], scale[1], scale[2]};
}

template <class A>
int64_t bin(A x, const A* scale) {
  return bin_of(x, scale_of(scale));
}

template <class A>
A edge(int64_t bin, const A* scale) {
  return upper_edge(bin, scale_of(scale));
}

template <class A>
void count(const A* x, const bool* mask, int64_t columns, const A* scale, uint32_t* counts) {
  count_bins(x, mask, columns, scale_of(scale), counts);
}

template <class A>
void sum(const A* x, const bool* mask, int64_t columns, const A* scale, A factor, const A* weights, double* total,
         double* moment, std::vector<A>* open) {
  Room<A> found;
  const WeightedSums sums = sum_bins<true>(x, mask, columns, scale_of(scale), factor, weights, open ? &found : nullptr);
  *total = sums.total, *moment = sums.moment;
  if (open) open->assign(found.begin(), found.end());
}

template <class A>
constexpr BinRoutinesOf<A> kRoutines{bin<A>, edge<A>, count<A>, sum<A>};

}  // namespace

extern const BinRoutines bin_routines = {kBins, kOpen, kRoutines<float>, kRoutines<double>};

}  // namespace mlot::MLOT_ISA
