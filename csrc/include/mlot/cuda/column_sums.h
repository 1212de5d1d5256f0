// Sums of probability over the rows of a sequence, for every column; see mlot_kernels/ops/rank_truncate/README.md.
#pragma once

#include "mlot/cuda/logits.h"
#include "mlot/cuda/temperatures.h"
#include "mlot/scalars.h"

namespace mlot::cuda {

constexpr int64_t kPartialRows = 64;  // slots of a sequence that one partial sum covers, whatever the batch

// Of a sequence; one of zeros where it has no slots.
inline int64_t parts_of(int64_t slots) { return slots > kPartialRows ? (slots + kPartialRows - 1) / kPartialRows : 1; }

// The columns of a row of sums in memory: every row begins at a multiple of 16 bytes.
inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// The sums are of the probabilities at the first temperature.
struct ColumnSums {
  LogitsRows rows;
  Temperatures temperatures;
  SavedScalars<void*> saved;  // of R temperatures, written in full
  void* sums;                 // [rankings, parts of a ranking, width], in the accumulator's dtype
  int64_t width;              // padded(vocab_size)
  int64_t rankings;           // sequences, or 1: all sequences are ranked together
};

// Of T, one of float, bfloat16, float16 and double. `column_sums` leaves the sums of a ranking in its first part.
template <class T>
void row_scalars(const ColumnSums& call, void* stream);
template <class T>
void column_sums(const ColumnSums& call, void* stream);

}  // namespace mlot::cuda
