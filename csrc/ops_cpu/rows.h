// What the doors of operators have in common whose kernels share a call among threads themselves.
#pragma once

#include <array>

#include "common.h"
#include "mlot/cpu/logits_rows.h"

namespace mlot {

inline Parallel threads() {
  return [](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (n > 0) torch::stable::parallel_for(0, n, grain, [&](int64_t first, int64_t last) { body(first, last); });
  };
}

inline LogitsRows rows_of(const LogitsArguments& logits, const Tensor& values, const double* temperatures,
                          int64_t count) {
  LogitsRows rows{logits.view, values.size(0), values.size(1), values.size(2), temperatures, count};
  return rows;
}

// The six saved scalars, dense in the accumulator's dtype.
using SavedTensors = std::array<Tensor, 6>;

inline SavedScalars<const void*> pointers(const SavedTensors& saved) {
  const auto at = [&](int i) { return saved[i].const_data_ptr(); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

}  // namespace mlot
