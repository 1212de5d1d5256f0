// Logits for kernels that share the rows of a call among threads themselves. Torch-free.
#pragma once

#include <cstdint>
#include <functional>

#include "mlot/cpu/logits.h"

namespace mlot {

// Runs body(first, last) over parts of [0, n) of at least `grain` each, on several threads; returns when all are done.
using Parallel = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

// Logits with the sizes that a whole call needs, at several temperatures; `temperature` of the base is not looked at.
struct LogitsRows : LogitsView {
  int64_t sequences, positions, width;  // B, T, and the columns of a row in memory
  const double* temperatures;
  int64_t temperature_count;

  int64_t all_slots() const { return sequences * slots; }
};

// The row scalars that forward leaves for backward: [B, A] of the accumulator's type; the two in front [R, B, A].
template <class Pointer>
struct SavedScalars {
  Pointer log_total, expected, peak, mean, scale, slope;
};

}  // namespace mlot
