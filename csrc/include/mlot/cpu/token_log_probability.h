// The log-probability of one token in every row; see mlot_kernels/ops/token_log_probability/README.md.
#pragma once

#include "mlot/cpu/logits.h"

namespace mlot {

// [B, A] each. Outputs are written in full, zeros beyond the counted rows.
struct TokenForward {
  LogitsRows rows;  // of one temperature
  const int64_t* tokens;
  void* log_probability;
  SavedScalars<void*> saved;
};

struct TokenBackward {
  LogitsRows rows;
  const int64_t* tokens;
  const void* grad;
  SavedScalars<const void*> saved;
  void* grad_values;  // [B, T, width], dense
  void* grad_log_scale;
};

// For float32, bfloat16, float16, float64.
struct TokenLogProbability {
  void (*forward[4])(const TokenForward&, const Parallel&);
  void (*backward[4])(const TokenBackward&, const Parallel&);
};

namespace baseline {
extern const TokenLogProbability token_log_probability;
}
namespace avx2 {
extern const TokenLogProbability token_log_probability;
}
namespace avx512 {
extern const TokenLogProbability token_log_probability;
}

}  // namespace mlot
