// The routines of mlot/cpu/select.h, one table per instruction set.
#pragma once

#include <cstdint>

namespace mlot {

// By dtype: float, bfloat16, float16, double.
struct SelectRoutines {
  void (*sort_keys[4])(const void* values, int64_t n, int64_t* keys);
  void (*select_largest[4])(const void* row, const bool* mask, int64_t n, int64_t k, int64_t* columns);
};

namespace baseline {
extern const SelectRoutines select_routines;
}
namespace avx2 {
extern const SelectRoutines select_routines;
}
namespace avx512 {
extern const SelectRoutines select_routines;
}

}  // namespace mlot
