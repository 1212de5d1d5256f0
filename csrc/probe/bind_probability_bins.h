// Hands the routines of mlot/cpu/probability_bins.h to Python.
#pragma once

#include <array>
#include <string>

#include "arrays.h"
#include "mlot/cpu/dispatch.h"
#include "probability_bins.h"

namespace mlot {

template <class A>
void bind_bin_routines(pybind11::module_& module, const BinRoutinesOf<A>& routines, int64_t bins,
                       const std::string& dtype) {
  using Scale = std::array<A, 3>;
  module.def(("bins_of_" + dtype).c_str(), [=](const Array<A>& x, const Scale& scale) {
    Array<int64_t> out(x.size());
    for (pybind11::ssize_t i = 0; i < x.size(); ++i) {
      out.mutable_data()[i] = routines.bin_of(x.data()[i], scale.data());
    }
    return out;
  });
  module.def(("upper_edges_" + dtype).c_str(), [=](const Array<int64_t>& of, const Scale& scale) {
    Array<A> out(of.size());
    for (pybind11::ssize_t i = 0; i < of.size(); ++i) {
      out.mutable_data()[i] = routines.upper_edge(of.data()[i], scale.data());
    }
    return out;
  });
  module.def(("count_bins_" + dtype).c_str(), [=](const Array<A>& x, const ProbeMask& mask, const Scale& scale) {
    std::vector<uint32_t> counts(static_cast<size_t>(bins));
    routines.count_bins(x.data(), mask_of(mask, x.size()), x.size(), scale.data(), counts.data());
    return array_of(counts);
  });
  // The sums, and the logits of open bins, which are looked for on demand.
  module.def(("sum_bins_" + dtype).c_str(), [=](const Array<A>& x, const ProbeMask& mask, const Scale& scale, A factor,
                                                const Array<A>& weights, bool look_for_open) {
    if (weights.size() != bins) throw std::invalid_argument("there must be a weight for every bin");
    double total, moment;
    std::vector<A> open;
    routines.sum_bins(x.data(), mask_of(mask, x.size()), x.size(), scale.data(), factor, weights.data(), &total,
                      &moment, look_for_open ? &open : nullptr);
    return pybind11::make_tuple(total, moment, array_of(open));
  });
}

inline void bind_probability_bins(pybind11::module_& module) {
  const BinRoutines& routines = MLOT_SELECT(bin_routines);
  module.attr("bins") = routines.bins;
  module.attr("open_bin") = routines.open;
  bind_bin_routines(module, routines.of_float, routines.bins, "float32");
  bind_bin_routines(module, routines.of_double, routines.bins, "float64");
}

}  // namespace mlot
