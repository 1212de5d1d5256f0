// Between NumPy's arrays and what the routines take.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <vector>

namespace mlot {

// Contiguous, and of this dtype: another one is an error and not converted.
template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;
using ProbeMask = std::optional<Array<bool>>;

template <class T>
Array<T> array_of(const std::vector<T>& values) {
  return Array<T>(pybind11::ssize_t(values.size()), values.data());
}

inline const bool* mask_of(const ProbeMask& mask, pybind11::ssize_t columns) {
  if (mask && mask->size() != columns) throw std::invalid_argument("mask must be as long as values");
  return mask ? mask->data() : nullptr;
}

}  // namespace mlot
