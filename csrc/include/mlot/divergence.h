// What a call of row_divergence asks for and leaves, as the kernels of all backends take it.
#pragma once

#include <cstdint>

namespace mlot {

enum class DivergenceKind { forward_kl, reverse_kl, jsd, total_variation, skew_kl, skew_reverse_kl, adaptive_kl };

struct DivergenceOptions {
  DivergenceKind kind;
  double beta;           // of jsd, between 0 and 1
  double skew;           // from 0 to below 1
  double head;           // of adaptive_kl, from 0 to below 1
  double interpolation;  // of forward_kl, above 0 and up to 1
  double floor;          // what smaller probabilities count as, without a gradient; from 0 to below 1
  const int64_t* pairs;  // [pair_count, 2], a student's column and the teacher's, or null: the same columns
  int64_t pair_count;
};

// The weight of p in the mixture, and kappa of the teacher; the student's is -kappa.
struct TermConstants {
  double weight, kappa;
};

// `share`: adaptive_kl's.
inline TermConstants constants_of(const DivergenceOptions& o, double share) {
  switch (o.kind) {
    case DivergenceKind::forward_kl:
      return {0, 1};
    case DivergenceKind::reverse_kl:
      return {0, -1};
    case DivergenceKind::jsd:
      return {o.beta, 0};
    case DivergenceKind::total_variation:
      return {0, 0};
    case DivergenceKind::skew_kl:
      return {o.skew, 1 - o.skew};
    case DivergenceKind::skew_reverse_kl:
      return {1 - o.skew, o.skew - 1};
    default:
      return {0, 2 * share - 1};
  }
}

// [B, A] each; a side's in the dtype of its accumulator, `share` and `target_log_total` in the wider one.
template <class Pointer>
struct DivergenceSaved {
  Pointer peak, log_total, mean, scale, slope, total, moment;
};

}  // namespace mlot
