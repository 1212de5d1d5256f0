// rank_truncate and gather_columns; see mlot_kernels/ops/rank_truncate/README.md. Backward is gradient_at_columns.h.
#pragma once

#include "mlot/cuda/column_sums.h"
#include "mlot/cuda/gradient_at_columns.h"
#include "mlot/rank_scope.h"

namespace mlot::cuda {

// Outputs are written in full, zeros beyond the counted rows. R temperatures.
struct RankTruncateForward {
  ColumnSums sums;  // with `saved`, an output; where columns are given or the scope is token, without sums
  bool ranks;       // else `columns` are there
  RankScope scope;
  bool columns_of_each_row;  // [B, A, k]
  int64_t k;
  void* log_probabilities;  // [R, B, A, k]
  int64_t* columns;         // [B, k] or [B, A, k]
  void* kept_mass;          // [B, A]
  void* found;              // [rankings, k] of 16 bytes: room

  bool ranks_together() const { return ranks && scope != RankScope::token; }
};

// For float32, bfloat16, float16, float64.
struct RankTruncate {
  void (*forward[4])(const RankTruncateForward&, void* stream);
};

extern const RankTruncate rank_truncate;

}  // namespace mlot::cuda
