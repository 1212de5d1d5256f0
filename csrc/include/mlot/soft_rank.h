// Soft ranks of the entries of rows, as the kernels of both libraries take them; see
// mlot_kernels/ops/soft_rank/README.md.
#pragma once

#include <cstdint>

namespace mlot {

// `order` and `block` go by position in descending order. A position's block is where it begins, its complement where
// no gradient passes (infinite values, positions beyond the length), `width` for what counts of a row with a NaN.
struct SoftRankForward {
  const void* values;  // [rows, width], columns contiguous
  int64_t row_stride;  // in elements
  int64_t rows, width;
  const int64_t* lengths;  // [rows], clipped to 0..width; null: all have `width`
  double epsilon;
  void* ranks;     // [rows, width] in the accumulator's dtype, like all that follow dense and written in full
  int32_t* order;  // [rows, width]: columns
  int32_t* block;  // [rows, width]
};

struct SoftRankBackward {
  const void* grad;  // [rows, width] in the accumulator's dtype, dense
  int64_t rows, width;
  const int32_t* order;
  const int32_t* block;
  double epsilon;
  void* gradient;  // [rows, width] in the values' dtype, dense, written in full
};

}  // namespace mlot
