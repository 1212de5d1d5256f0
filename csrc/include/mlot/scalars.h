// What forward leaves for backward, of each row: [B, A], in the accumulator's dtype; 0 beyond the counted rows.
#pragma once

namespace mlot {

// Of the operators over log-probabilities; the two in front [R, B, A] for R temperatures.
template <class Pointer>
struct SavedScalars {
  Pointer log_total, expected, peak, mean, scale, slope;
};

template <class Pointer>
struct RowEntropyScalars {
  Pointer entropy, mass, peak, log_total, mean, scale, slope, moment;
};

}  // namespace mlot
