// Hands mlot/cpu/key_histogram.h to Python.
#pragma once

#include "arrays.h"
#include "key_histogram.h"
#include "mlot/cpu/dispatch.h"

namespace mlot {

inline void bind_key_histogram(pybind11::module_& module) {
  const HistogramRoutines& routines = MLOT_SELECT(histogram_routines);
  const char* const names[] = {"count_values_bfloat16", "count_values_float16"};
  for (int i = 0; i < 2; ++i) {
    module.def(names[i], [count = routines.count[i]](const Array<uint16_t>& bits, const ProbeMask& mask) {
      std::vector<float> x;
      std::vector<uint32_t> all, kept;
      const bool nan = count(bits.data(), mask_of(mask, bits.size()), bits.size(), x, all, kept);
      return pybind11::make_tuple(array_of(x), array_of(all), array_of(kept), nan);
    });
  }
}

}  // namespace mlot
