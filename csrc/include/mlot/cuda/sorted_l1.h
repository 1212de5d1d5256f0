// The L1 distance of two rows of probabilities, each in descending order, and its gradient; see
// mlot_kernels/ops/sorted_l1/README.md.
#pragma once

#include "mlot/cuda/logits.h"
#include "mlot/sorted_l1.h"

namespace mlot::cuda {

// Where clusters sort rows, one pair at a time: `clusters` times `each` bytes of device memory, and in these where each
// thing begins.
struct SortRoom {
  unsigned char* memory;
  int64_t clusters, each;
  int64_t keys[2], spare, columns, spare_columns;
};

// Outputs are written in full. Side 0 is the student, side 1 the teacher.
struct SortedL1Forward {
  LogitsRows sides[2];
  SortedL1Options options;
  SortRoom room;
  void* loss;         // [B, A], in the wider of the two accumulators' dtypes
  void* expected[2];  // [B, A]: room for each row's mean of x - peak
  SortedL1Saved<void*> saved[2];
};

// The gradient of one side, and what the other one is.
struct SortedL1Backward {
  LogitsRows rows, other;
  SortedL1Options options;
  SortRoom room;
  const void* grad;  // [B, A], in the side's accumulator's dtype
  SortedL1Saved<const void*> saved, other_saved;
  void* grad_values;     // [B, T, width], dense
  void* grad_log_scale;  // [B, A]
  int32_t* slot_of;      // [B, T]: room
};

// By the dtypes of student and teacher, and of a side and the other one; each one of float32, bfloat16, float16,
// float64.
struct SortedL1 {
  void (*forward[4][4])(const SortedL1Forward&, void* stream);
  void (*backward[4][4])(const SortedL1Backward&, void* stream);
};

extern const SortedL1 sorted_l1;

// The room that forward needs, or backward, where the columns of the first side are sorted along; without its memory,
// which is nothing where rows are counted. `bytes`: of a logit of either side.
SortRoom room_of_forward(const LogitsRows (&sides)[2], const int64_t (&bytes)[2]);
SortRoom room_of_backward(const LogitsRows (&sides)[2], const int64_t (&bytes)[2], const SortedL1Options& options);

}  // namespace mlot::cuda
