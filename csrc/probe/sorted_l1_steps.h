// mlot/cpu/sorted_l1_steps.h, one table per instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace mlot {

// Steps as their thresholds, signs and lengths, which are 0 but where an equal logit is split.
template <class A>
struct StepList {
  const A *below, *sign;
  const uint32_t* length;
  int64_t count;
};

template <class A>
struct StepRoutinesOf {
  // The sign of each of n columns in their order.
  void (*signs)(const StepList<A>& steps, const A* x, int64_t n, A* out);
  void (*save)(const StepList<A>& steps, A* saved);  // [saved_steps, 2]
  bool (*load)(const A* saved, std::vector<A>& below, std::vector<A>& sign);
};

struct StepRoutines {
  int64_t saved_steps;
  StepRoutinesOf<float> of_float;
  StepRoutinesOf<double> of_double;
};

namespace baseline {
extern const StepRoutines step_routines;
}
namespace avx2 {
extern const StepRoutines step_routines;
}
namespace avx512 {
extern const StepRoutines step_routines;
}

}  // namespace mlot
