// A divergence of each pair of rows, and its gradient; see mlot_kernels/ops/row_divergence/README.md.
#pragma once

#include "mlot/cuda/logits.h"
#include "mlot/divergence.h"

namespace mlot::cuda {

// Side 0 is the student, 1 the teacher.
struct DivergenceProblem {
  LogitsRows sides[2];  // of one vocab_size but with pairs
  Dtype dtypes[2];
  DivergenceOptions options;
  TermConstants constants;  // for a share of 1
  double log_floor;

  int64_t columns() const { return options.pairs ? options.pair_count : sides[0].vocab_size; }
  bool in_double() const { return dtypes[0] == Dtype::float64 || dtypes[1] == Dtype::float64; }
};

// Outputs are written in full.
struct RowDivergenceForward {
  DivergenceProblem problem;
  void* loss;  // [B, A], in the wider accumulator
  DivergenceSaved<void*> saved[2];
  void *share, *target_log_total;
};

// Of room for backward with pairs: their numbers and columns, twice, and where each column's begin.
inline int64_t words_of_pairs(int64_t pair_count, int64_t vocab_size) { return 4 * pair_count + vocab_size + 1; }

// Of one side.
struct RowDivergenceBackward {
  DivergenceProblem problem;
  DivergenceSaved<const void*> saved[2];
  const void *share, *target_log_total;
  int own;               // the side
  const void* grad;      // [B, A], dense, in the dtype of the side's accumulator
  void* grad_values;     // [B, T, width], dense
  void* grad_log_scale;  // [B, A]
  int32_t* slot_of;      // [B, T]: room for the slot that counts each row
  uint32_t* pair_lists;  // [words_of_pairs] where there are pairs: room
};

void launch_row_divergence_forward(const RowDivergenceForward& call, void* stream);
void launch_row_divergence_backward(const RowDivergenceBackward& call, void* stream);

}  // namespace mlot::cuda
