// Logits as the kernels over rows take them: the raw form of mlot_kernels.logits.Side. Torch-free.
#pragma once

#include <cstdint>
#include <functional>

#include "mlot/scalars.h"

namespace mlot {

// Runs body(first, last) over parts of [0, n) of at least `grain` each, on several threads; returns when all are done.
using Parallel = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

// Pointers are to elements of T, one of float, bfloat16, float16 and double; scalars of a row are in its accumulator's
// dtype. A slot is a place in [B, A], flat; its row lies at a position in [B, T].
struct LogitsRows {
  const void* values;    // [B, T, width], columns contiguous
  int64_t batch_stride;  // in elements
  int64_t row_stride;
  int64_t sequences, positions, width;  // B, T, and the columns of a row in memory
  const int64_t* index;                 // [B, A]: the position of each counted row in its sequence, -1 beyond them
  int64_t slots;                        // A
  int64_t vocab_size;                   // columns from here on do not belong to the distribution
  const bool* column_mask;              // [V] or null: all columns are looked at
  const void* log_scale;                // [B, A] or null: 0
  bool standardize;
  const double* temperatures;
  int64_t temperature_count;

  int64_t all_slots() const { return sequences * slots; }
};

// The row of `slot`; null where none counts there.
template <class T>
static inline const T* row_of(const LogitsRows& rows, int64_t slot) {
  const int64_t position = rows.index[slot];
  if (position < 0) return nullptr;
  return static_cast<const T*>(rows.values) + slot / rows.slots * rows.batch_stride + position * rows.row_stride;
}

}  // namespace mlot
