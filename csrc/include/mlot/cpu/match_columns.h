// Which student columns meet a teacher's k columns; see mlot_kernels/ops/match_columns/README.md.
#pragma once

#include "mlot/cpu/logits.h"

namespace mlot {

// One of the outputs is null. The accumulator is double where either side is, else float.
struct MatchColumns {
  LogitsRows rows;      // of one temperature
  const void* teacher;  // log-probabilities [B, A, k] of the accumulator
  int64_t k;
  int64_t* columns;  // [B, k]: the greedy choice, -1 where there is none
  void* costs;       // [B, k, vocab_size] of the accumulator: inf where a column is not looked at
};

// For the accumulators float and double, and for logits of float32, bfloat16, float16, float64; null where float is too
// narrow.
struct ColumnMatching {
  void (*run[2][4])(const MatchColumns&, const Parallel&);
};

namespace baseline {
extern const ColumnMatching match_columns;
}
namespace avx2 {
extern const ColumnMatching match_columns;
}
namespace avx512 {
extern const ColumnMatching match_columns;
}

}  // namespace mlot
