// rank_truncate and gather_columns; see mlot_kernels/ops/rank_truncate/README.md.
#pragma once

#include "mlot/cpu/logits.h"
#include "mlot/rank_scope.h"

namespace mlot {

// Outputs are written in full, zeros beyond the counted rows. R temperatures.
struct RankTruncateForward {
  LogitsRows rows;
  const int64_t* given;  // [B, k], or [B, A, k] for scope token; null: rank
  int64_t k;
  RankScope scope;
  int64_t threads;          // how many `Parallel` has
  void* log_probabilities;  // [R, B, A, k]
  int64_t* columns;         // [B, k], or [B, A, k] for scope token
  void* kept_mass;          // [B, A]
  SavedScalars<void*> saved;
};

struct RankTruncateBackward {
  LogitsRows rows;
  const void* grad_log_probabilities;  // [R, B, A, k], dense
  const void* grad_kept_mass;          // [B, A], dense
  const int64_t* columns;
  bool columns_of_each_row;  // [B, A, k]
  int64_t k;
  const void* log_probabilities;  // [R, B, A, k], dense
  SavedScalars<const void*> saved;
  void* grad_values;     // [B, T, width], dense
  void* grad_log_scale;  // [B, A]
};

// For float32, bfloat16, float16, float64.
struct RankTruncate {
  void (*forward[4])(const RankTruncateForward&, const Parallel&);
  void (*backward[4])(const RankTruncateBackward&, const Parallel&);
};

namespace baseline {
extern const RankTruncate rank_truncate;
}
namespace avx2 {
extern const RankTruncate rank_truncate;
}
namespace avx512 {
extern const RankTruncate rank_truncate;
}

}  // namespace mlot
