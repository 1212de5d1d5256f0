// Entropic transport between two sides of features under L1 costs, on a GPU; see
// mlot_kernels/ops/transport_cost/README.md.
#pragma once

#include "mlot/feature_rows.h"
#include "mlot/transport.h"

namespace mlot::cuda {

// Both sides in one dtype. The transport's own costs are null: they are made of the features.
struct TransportCostForward {
  FeatureRows x, y;
  int64_t width;  // D
  SinkhornForward transport;
};

struct TransportCostBackward {
  FeatureRows x, y;
  int64_t width;
  SinkhornBackward transport;
  void *grad_x, *grad_y;  // as the side, dense, written in full; null where it needs none
};

// Bytes of device memory that a call works in, beside its outputs. `accumulator`: bytes of a number in sums.
int64_t transport_cost_forward_room(const TransportOptions& options, int64_t accumulator);
int64_t transport_cost_backward_room(const TransportOptions& options, int64_t accumulator);

// For float32, bfloat16, float16, float64. Histories are those of sinkhorn.h.
extern void (*const transport_cost_forward[4])(const TransportCostForward&, void* room, void* stream);
extern void (*const transport_cost_backward[4])(const TransportCostBackward&, void* room, void* stream);

}  // namespace mlot::cuda
