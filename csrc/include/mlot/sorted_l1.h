// What sorted_l1's kernels of all backends share; see mlot_kernels/ops/sorted_l1/README.md.
#pragma once

#include <cstdint>

namespace mlot {

// How many steps of a side's sign, as a function of the logit, forward leaves for backward.
constexpr int64_t kSavedSteps = 64;

// What forward leaves of a side for backward: row scalars [B, A] in the side's accumulator's dtype, zeros beyond the
// counted rows; and steps [B, A, kSavedSteps, 2], how many there are and the first one's sign, then each further one's
// threshold, which its logits are below, and its sign. A negative number: they are too many, or no function of the
// logit.
template <class Pointer>
struct SortedL1Saved {
  Pointer peak, log_total, mean, scale, slope, total, moment, steps;
};

struct SortedL1Options {
  bool mean_over_ties;  // or by a stable order
  int64_t top_k;
  bool bucket;  // the sums beyond top_k count
};

}  // namespace mlot
