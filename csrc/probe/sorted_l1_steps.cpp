#include "mlot/cpu/sorted_l1_steps.h"

#include "sorted_l1_steps.h"

namespace mlot::MLOT_ISA {
namespace {

template <class A>
Steps<A> steps_of(const StepList<A>& list) {
  Steps<A> steps;
  for (int64_t i = 0; i < list.count; ++i) {
    if (list.length[i] > 0) {
      steps.add_split(list.sign[i], A(0), list.below[i], list.length[i]);
    } else {
      steps.add(list.sign[i], A(0), [&] { return list.below[i]; });
    }
  }
  return steps;
}

template <class A>
void signs(const StepList<A>& list, const A* x, int64_t n, A* out) {
  const Steps<A> steps = steps_of(list);
  StepTable<A> table(steps);
  for (int64_t i = 0; i < n; ++i) out[i] = table.next(x[i]);
}

template <class A>
void save(const StepList<A>& list, A* saved) {
  steps_of(list).save(saved);
}

template <class A>
bool load(const A* saved, std::vector<A>& below, std::vector<A>& sign) {
  Steps<A> steps;
  const bool were_saved = steps.load(saved);
  below = steps.below, sign = steps.sign;
  return were_saved;
}

template <class A>
constexpr StepRoutinesOf<A> kRoutines{signs<A>, save<A>, load<A>};

}  // namespace

extern const StepRoutines step_routines = {kSavedSteps, kRoutines<float>, kRoutines<double>};

}  // namespace mlot::MLOT_ISA
