// Hands mlot/cpu/sorted_l1_steps.h to Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "arrays.h"
#include "mlot/cpu/dispatch.h"
#include "sorted_l1_steps.h"

namespace mlot {

template <class A>
void bind_step_routines(pybind11::module_& module, const StepRoutinesOf<A>& routines, int64_t saved_steps,
                        const std::string& dtype) {
  const auto list_of = [](const Array<A>& below, const Array<A>& sign, const Array<uint32_t>& length) {
    if (sign.size() != below.size() || length.size() != below.size() || below.size() == 0) {
      throw std::invalid_argument("every step must have a threshold, a sign and a length");
    }
    return StepList<A>{below.data(), sign.data(), length.data(), below.size()};
  };
  module.def(("step_signs_" + dtype).c_str(),
             [=](const Array<A>& below, const Array<A>& sign, const Array<uint32_t>& length, const Array<A>& x) {
               Array<A> out(x.size());
               routines.signs(list_of(below, sign, length), x.data(), x.size(), out.mutable_data());
               return out;
             });
  module.def(("save_steps_" + dtype).c_str(),
             [=](const Array<A>& below, const Array<A>& sign, const Array<uint32_t>& length) {
               Array<A> saved(2 * saved_steps);
               std::fill_n(saved.mutable_data(), saved.size(), A(NAN));  // what is not written shows
               routines.save(list_of(below, sign, length), saved.mutable_data());
               return saved;
             });
  // None where they were not saved.
  module.def(("load_steps_" + dtype).c_str(), [=](const Array<A>& saved) -> pybind11::object {
    if (saved.size() != 2 * saved_steps) throw std::invalid_argument("saved must be what save_steps made");
    std::vector<A> below, sign;
    if (!routines.load(saved.data(), below, sign)) return pybind11::none();
    return pybind11::make_tuple(array_of(below), array_of(sign));
  });
}

inline void bind_sorted_l1_steps(pybind11::module_& module) {
  const StepRoutines& routines = MLOT_SELECT(step_routines);
  module.attr("saved_steps") = routines.saved_steps;
  bind_step_routines(module, routines.of_float, routines.saved_steps, "float32");
  bind_step_routines(module, routines.of_double, routines.saved_steps, "float64");
}

}  // namespace mlot
