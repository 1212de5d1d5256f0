// One side of a comparison of feature vectors, as the operators' kernels take it.
#pragma once

#include <cstdint>

namespace mlot {

// [B, rows, D]. Strides in elements.
struct FeatureRows {
  const void* values;
  int dtype;  // float32, bfloat16, float16, float64
  int64_t rows;
  int64_t problem_stride, row_stride, column_stride;
};

}  // namespace mlot
