// What a call of row_divergence asks for, as kernels take it.
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
  const int64_t* pairs;  // [pair_count, 2], a student's column and the teacher's, or null: the same columns
  int64_t pair_count;
};

}  // namespace mlot
