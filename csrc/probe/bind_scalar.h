// Hands the routines of mlot/cpu/scalar.h and mlot/cpu/vector.h to Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "mlot/cpu/dispatch.h"
#include "scalar.h"

namespace mlot {

// A routine over arrays as a function of one array.
template <class From, class To>
auto over(void (*routine)(const From*, To*, int64_t)) {
  return [routine](const pybind11::array_t<From, pybind11::array::c_style>& x) {
    constexpr pybind11::ssize_t kStep = 64;  // a multiple of every vector's length
    if (x.size() % kStep != 0) throw pybind11::value_error("the array's size must be a multiple of 64");
    pybind11::array_t<To> out(x.size());
    routine(x.data(), out.mutable_data(), x.size());
    return out;
  };
}

inline void bind_scalar(pybind11::module_& module) {
  const ScalarProbe& probe = MLOT_SELECT(scalar_probe);
  module.def("exp_negative", over(probe.exp_negative));
  module.def("exp2_negative", over(probe.exp2_negative));
  module.def("exp2_negative_double", over(probe.exp2_negative_double));
  module.def("logarithm", over(probe.logarithm));
  module.def("logarithm_double", over(probe.logarithm_double));
  const char* const names[] = {"bfloat16", "float16"};
  for (int i = 0; i < 2; ++i) {
    const std::string name = names[i];
    module.def(("wide_" + name).c_str(), over(probe.wide[i]));
    module.def(("narrow_" + name).c_str(), over(probe.narrow[i]));
    module.def(("load_pair_" + name).c_str(), over(probe.load_pair[i]));
    module.def(("store_pair_" + name).c_str(), over(probe.store_pair[i]));
  }
}

}  // namespace mlot
