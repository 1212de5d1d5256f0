// The k largest of rows, in the order of a stable descending sort: NaN first, the lower column first among equals, -0
// equal to 0, columns that a mask leaves out last.
#pragma once

#include "mlot/cuda/logits.h"

namespace mlot::cuda {

struct Selection {
  const bool* column_mask;  // [V] or null
  int64_t end;              // columns, below 2^32
  int64_t k;                // at most `end`
  int64_t rows;
  int64_t copies;    // how often each row's columns are written
  int64_t* columns;  // [rows, copies, k]
  void* found;       // [rows, k] of kFoundBytes: room
};

// Of a column and what it is ordered by.
constexpr int64_t kFoundBytes = 16;

// Row i of a dense matrix, `width` elements apart, of T, one of float and double.
template <class T>
void select_of_matrix(const void* values, int64_t width, const Selection& to, void* stream);

// The row of slot i, of T, one of float, bfloat16, float16 and double. All are equal where no row counts and where
// `log_total` [B, A] is NaN.
template <class T>
void select_of_slots(const LogitsRows& rows, const void* log_total, const Selection& to, void* stream);

}  // namespace mlot::cuda
