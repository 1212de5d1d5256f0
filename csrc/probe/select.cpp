#include "mlot/cpu/select.h"

#include "select.h"

namespace mlot::MLOT_ISA {
namespace {

template <class T>
void sort_keys(const void* values, int64_t n, int64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = sort_key(Accumulator<T>(wide(static_cast<const T*>(values)[i])));
}

template <class T>
void select(const void* row, const bool* mask, int64_t n, int64_t k, int64_t* columns) {
  SelectScratch<Accumulator<T>> scratch;
  select_largest(static_cast<const T*>(row), mask, n, k, columns, scratch);
}

}  // namespace

extern const SelectRoutines select_routines = {
    {sort_keys<float>, sort_keys<bfloat16>, sort_keys<float16>, sort_keys<double>},
    {select<float>, select<bfloat16>, select<float16>, select<double>}};

}  // namespace mlot::MLOT_ISA
