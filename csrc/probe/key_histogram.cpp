#include "mlot/cpu/key_histogram.h"

#include "key_histogram.h"

namespace mlot::MLOT_ISA {
namespace {

template <class T>
bool count(const void* row, const bool* mask, int64_t columns, std::vector<float>& x, std::vector<uint32_t>& all,
           std::vector<uint32_t>& kept) {
  static thread_local KeyHistogram<T> histogram;
  CountedValues values;
  histogram.count(static_cast<const T*>(row), mask, columns, values);
  x = values.x, all = values.all, kept = values.kept;
  return values.nan;
}

}  // namespace

extern const HistogramRoutines histogram_routines = {{count<bfloat16>, count<float16>}};

}  // namespace mlot::MLOT_ISA
