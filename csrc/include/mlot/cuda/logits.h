// Logits as the CUDA kernels over rows take them: the raw form of mlot_kernels.logits.Side, in device memory.
#pragma once

#include <cstdint>

namespace mlot::cuda {

enum class Dtype { float32, bfloat16, float16, float64 };  // in the order of the tables of launchers

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
  double temperature;
  bool standardize;

  int64_t all_slots() const { return sequences * slots; }
  int64_t all_positions() const { return sequences * positions; }
};

}  // namespace mlot::cuda
