// Hands the routines of mlot/cpu/select.h to Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "mlot/cpu/dispatch.h"
#include "select.h"

namespace mlot {

// A row: float32, float64, or the bits of a 16-bit dtype as uint16.
using ProbeRow = pybind11::array;

inline int probe_dtype(const std::string& dtype, const ProbeRow& row) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64"};
  constexpr pybind11::ssize_t kBytes[] = {4, 2, 2, 8};
  for (int i = 0; i < 4; ++i) {
    if (dtype != kNames[i]) continue;
    if (row.ndim() != 1 || row.itemsize() != kBytes[i] || !(row.flags() & pybind11::array::c_style)) {
      throw std::invalid_argument("values must be a contiguous row of " + dtype);
    }
    return i;
  }
  throw std::invalid_argument("dtype must be float32, bfloat16, float16 or float64, got " + dtype);
}

inline void bind_select(pybind11::module_& module) {
  using Columns = pybind11::array_t<int64_t>;
  using Mask = pybind11::array_t<bool, pybind11::array::c_style>;
  module.def(
      "sort_keys",
      [](const ProbeRow& values, const std::string& dtype) {
        const int i = probe_dtype(dtype, values);
        Columns keys(values.size());
        MLOT_SELECT(select_routines).sort_keys[i](values.data(), values.size(), keys.mutable_data());
        return keys;
      },
      pybind11::arg("values"), pybind11::arg("dtype"));
  module.def(
      "select_largest",
      [](const ProbeRow& values, const std::string& dtype, int64_t k, const std::optional<Mask>& mask) {
        const int i = probe_dtype(dtype, values);
        if (k < 1 || k > values.size()) throw std::invalid_argument("k must be in 1..n");
        if (mask && mask->size() != values.size()) throw std::invalid_argument("mask must be as long as values");
        Columns columns(k);
        MLOT_SELECT(select_routines)
            .select_largest[i](values.data(), mask ? mask->data() : nullptr, values.size(), k, columns.mutable_data());
        return columns;
      },
      pybind11::arg("values"), pybind11::arg("dtype"), pybind11::arg("k"), pybind11::arg("mask") = pybind11::none());
}

}  // namespace mlot
