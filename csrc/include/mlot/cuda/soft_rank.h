// Soft ranks of the entries of rows, and their gradient; see mlot_kernels/ops/soft_rank/README.md.
#pragma once

#include "mlot/soft_rank.h"

namespace mlot::cuda {

constexpr int64_t kMostRanked = 4096;  // entries of a row, which lies in shared memory

// For float32, bfloat16, float16, float64.
struct SoftRank {
  void (*forward[4])(const SoftRankForward&, void* stream);
  void (*backward[4])(const SoftRankBackward&, void* stream);
};

extern const SoftRank soft_rank;

}  // namespace mlot::cuda
