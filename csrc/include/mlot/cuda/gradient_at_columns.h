// The gradient of log-probabilities at a few columns of each row; mlot_kernels/logits.py has the formulas.
#pragma once

#include "mlot/cuda/logits.h"
#include "mlot/cuda/temperatures.h"
#include "mlot/scalars.h"

namespace mlot::cuda {

// R temperatures.
struct GradientAtColumns {
  LogitsRows rows;
  Temperatures temperatures;
  const void* grad_log_p;  // [R, B, A, k], dense
  const void* grad_mass;   // [B, A], of the sum of exp(log_p) at the first temperature; or null
  const void* grad_lse;    // [B, A], of the normaliser's log where there is one temperature; or null
  const void* log_p;       // [R, B, A, k], dense; needed for grad_mass alone
  const int64_t* columns;  // [B, k], or [B, A, k]; they may repeat
  bool columns_of_each_row;
  int64_t k;
  SavedScalars<const void*> saved;
  void* grad_values;     // [B, T, width], dense
  void* grad_log_scale;  // [B, A]
  int32_t* slot_of;      // [B, T]: room for the slot that counts each row
  void* weight;          // [R, B, A]: room for what stands before 2^t in the gradient
  void* through;         // [B, A]: room for what stands before x - peak - mean
};

// For float32, bfloat16, float16, float64.
extern void (*const gradient_at_columns[4])(const GradientAtColumns&, void* stream);

}  // namespace mlot::cuda
