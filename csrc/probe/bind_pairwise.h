// Hands mlot/cpu/pairwise.h to Python.
#pragma once

#include <string>

#include "arrays.h"
#include "mlot/cpu/dispatch.h"
#include "pairwise.h"

namespace mlot {

template <class A>
void bind_pairwise_routines(pybind11::module_& module, const PairwiseRoutinesOf<A>& routines,
                            const std::string& dtype) {
  const auto tables_of = [](const std::string& metric, const Array<A>& x, const Array<A>& y, int64_t first,
                            int64_t last) {
    const auto chosen = metric_of(metric);
    if (!chosen) throw std::invalid_argument("there is no such metric");
    if (x.ndim() != 2 || y.ndim() != 2 || x.shape(1) != y.shape(1) || y.shape(0) == 0) {
      throw std::invalid_argument("x and y must be [M, D] and [N, D]");
    }
    if (first < 0 || first >= last || last > x.shape(0)) throw std::invalid_argument("rows must be within x");
    return FeatureTables<A>{*chosen, x.data(), y.data(), x.shape(0), y.shape(0), x.shape(1)};
  };
  module.def(("cost_rows_" + dtype).c_str(),
             [=](const std::string& metric, const Array<A>& x, const Array<A>& y, int64_t first, int64_t last) {
               const auto tables = tables_of(metric, x, y, first, last);
               Array<A> out({last - first, tables.N});
               routines.costs(tables, first, last, out.mutable_data());
               return out;
             });
  module.def(("cost_gradient_rows_" + dtype).c_str(),
             [=](const std::string& metric, const Array<A>& x, const Array<A>& y, int64_t first, int64_t last,
                 const Array<A>& weights) {
               const auto tables = tables_of(metric, x, y, first, last);
               if (weights.size() != (last - first) * tables.N)
                 throw std::invalid_argument("weights must be [last - first, N]");
               Array<A> out({last - first, tables.D});
               routines.gradient(tables, first, last, weights.data(), out.mutable_data());
               return out;
             });
}

inline void bind_pairwise(pybind11::module_& module) {
  const PairwiseRoutines& routines = MLOT_SELECT(pairwise_routines);
  bind_pairwise_routines(module, routines.of_float, "float32");
  bind_pairwise_routines(module, routines.of_double, "float64");
}

}  // namespace mlot
