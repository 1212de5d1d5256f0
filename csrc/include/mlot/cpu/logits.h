// Logits as the kernels over rows take them: the raw form of mlot_kernels.logits.Side.
#pragma once

#include <cstdint>

namespace mlot {

// Pointers to elements of T, one of float, bfloat16, float16 and double; scalars of a row are in its accumulator's
// dtype. A slot is a place in [B, A], flat; its row lies at a position in [B, T].
struct LogitsView {
  const void* values;    // [B, T, V], columns contiguous
  int64_t batch_stride;  // in elements
  int64_t row_stride;
  const int64_t* index;     // [B, A]: the position of each counted row in its sequence, -1 beyond them
  int64_t slots;            // A
  int64_t vocab_size;       // columns from here on do not belong to the distribution
  const bool* column_mask;  // [V] or null: all columns are looked at
  const void* log_scale;    // [B, A] or null: 0
  double temperature;
  bool standardize;
};

// The row of `slot`; null where none counts there.
template <class T>
static inline const T* row_of(const LogitsView& logits, int64_t slot) {
  const int64_t position = logits.index[slot];
  if (position < 0) return nullptr;
  return static_cast<const T*>(logits.values) + slot / logits.slots * logits.batch_stride +
         position * logits.row_stride;
}

// Where the gradient of that row goes in a contiguous [B, T, V].
template <class T>
static inline T* gradient_row_of(const LogitsView& logits, void* gradient, int64_t positions, int64_t columns,
                                 int64_t slot) {
  return static_cast<T*>(gradient) + (slot / logits.slots * positions + logits.index[slot]) * columns;
}

}  // namespace mlot
