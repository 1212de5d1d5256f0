// The log-probability of one token in every row; see mlot_kernels/ops/token_log_probability/README.md.
#pragma once

#include "mlot/cuda/logits.h"
#include "mlot/scalars.h"

namespace mlot::cuda {

// [B, A] each. Outputs are written in full, zeros beyond the counted rows.
struct TokenForward {
  LogitsRows rows;
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
  int32_t* slot_of;  // [B, T]: room for the slot that counts each row
};

// For float32, bfloat16, float16, float64.
struct TokenLogProbability {
  void (*forward[4])(const TokenForward&, void* stream);
  void (*backward[4])(const TokenBackward&, void* stream);
};

extern const TokenLogProbability token_log_probability;

}  // namespace mlot::cuda
