// mlot/cpu/key_histogram.h, one table per instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace mlot {

// A row's CountedValues; returns whether a NaN is there. The calls of a thread share their counters, as its rows do.
using CountValues = bool (*)(const void* row, const bool* mask, int64_t columns, std::vector<float>& x,
                             std::vector<uint32_t>& all, std::vector<uint32_t>& kept);

// For bfloat16 and float16.
struct HistogramRoutines {
  CountValues count[2];
};

namespace baseline {
extern const HistogramRoutines histogram_routines;
}
namespace avx2 {
extern const HistogramRoutines histogram_routines;
}
namespace avx512 {
extern const HistogramRoutines histogram_routines;
}

}  // namespace mlot
