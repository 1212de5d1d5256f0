// Hands the routines of mlot/cpu/run_length.h to Python.
#pragma once

#include <string>

#include "arrays.h"
#include "mlot/cpu/dispatch.h"
#include "run_length.h"

namespace mlot {

template <class A, class Key>
void bind_run_routines(pybind11::module_& module, const RunRoutinesOf<A, Key>& routines, const std::string& dtype) {
  const auto keys_of = [](const Array<Key>& keys) { return std::vector<Key>(keys.data(), keys.data() + keys.size()); };
  module.def(("sort_ascending_" + dtype).c_str(), [=](const Array<Key>& keys) {
    std::vector<Key> sorted = keys_of(keys);
    routines.sort_ascending(sorted);
    return array_of(sorted);
  });
  // None where they are not few.
  module.def(("count_few_keys_" + dtype).c_str(), [=](const Array<Key>& keys) -> pybind11::object {
    std::vector<Key> distinct;
    std::vector<uint32_t> times;
    if (!routines.count_few_keys(keys_of(keys), distinct, times)) return pybind11::none();
    return pybind11::make_tuple(array_of(distinct), array_of(times));
  });
  module.def(("runs_of_" + dtype).c_str(), [=](const Array<A>& x) {
    std::vector<A> distinct;
    std::vector<uint32_t> times;
    routines.runs_of(x.data(), x.size(), distinct, times);
    return pybind11::make_tuple(array_of(distinct), array_of(times));
  });
  module.def(("value_above_" + dtype).c_str(), [=](const Array<A>& x) {
    Array<A> out(x.size());
    for (pybind11::ssize_t i = 0; i < x.size(); ++i) out.mutable_data()[i] = routines.value_above(x.data()[i]);
    return out;
  });
}

inline void bind_run_length(pybind11::module_& module) {
  const RunRoutines& routines = MLOT_SELECT(run_routines);
  bind_run_routines(module, routines.of_float, "float32");
  bind_run_routines(module, routines.of_double, "float64");
}

}  // namespace mlot
