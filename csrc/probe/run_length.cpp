#include "mlot/cpu/run_length.h"

#include "run_length.h"

namespace mlot::MLOT_ISA {
namespace {

template <class T>
Room<T> room(const std::vector<T>& values) {
  return Room<T>(values.begin(), values.end());
}

template <class T>
void take(const Room<T>& values, std::vector<T>& out) {
  out.assign(values.begin(), values.end());
}

template <class Key>
void sort(std::vector<Key>& keys) {
  Room<Key> own = room(keys), other;
  sort_ascending(own, other);
  take(own, keys);
}

template <class Key>
bool count_few(const std::vector<Key>& keys, std::vector<Key>& distinct, std::vector<uint32_t>& times) {
  Room<Key> found;
  Room<uint32_t> counts;
  const bool few = count_few_keys(room(keys), found, counts);
  take(found, distinct), take(counts, times);
  return few;
}

template <class A>
void runs(const A* x, int64_t n, std::vector<A>& distinct, std::vector<uint32_t>& times) {
  Room<UnsignedKey<A>> keys, other;
  Runs<A> made;
  runs_of(Room<A>(x, x + n), keys, other, made);
  take(made.x, distinct), take(made.count, times);
}

template <class A, class Key>
constexpr RunRoutinesOf<A, Key> kRoutines{sort<Key>, count_few<Key>, runs<A>, value_above<A>};

}  // namespace

extern const RunRoutines run_routines = {kRoutines<float, uint32_t>, kRoutines<double, uint64_t>};

}  // namespace mlot::MLOT_ISA
