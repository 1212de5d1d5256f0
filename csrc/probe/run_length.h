// The routines of mlot/cpu/run_length.h that stand alone, one table per instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace mlot {

template <class A, class Key>
struct RunRoutinesOf {
  void (*sort_ascending)(std::vector<Key>& keys);
  bool (*count_few_keys)(const std::vector<Key>& keys, std::vector<Key>& distinct, std::vector<uint32_t>& times);
  void (*runs_of)(const A* x, int64_t n, std::vector<A>& distinct, std::vector<uint32_t>& times);
  A (*value_above)(A x);
};

struct RunRoutines {
  RunRoutinesOf<float, uint32_t> of_float;
  RunRoutinesOf<double, uint64_t> of_double;
};

namespace baseline {
extern const RunRoutines run_routines;
}
namespace avx2 {
extern const RunRoutines run_routines;
}
namespace avx512 {
extern const RunRoutines run_routines;
}

}  // namespace mlot
