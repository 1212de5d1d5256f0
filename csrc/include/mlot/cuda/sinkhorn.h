// Sinkhorn's iteration on a GPU, and its gradient; see mlot_kernels/ops/sinkhorn/README.md.
#pragma once

#include <cstdint>

#include "mlot/transport.h"

namespace mlot::cuda {

// Bytes of device memory that a call works in, beside its outputs. `accumulator`: bytes of a number in sums.
int64_t sinkhorn_forward_room(const TransportOptions& options, int64_t accumulator);
int64_t sinkhorn_backward_room(const TransportOptions& options, int64_t accumulator);

// For float32, bfloat16, float16, float64. The histories hold F and G of step 1, in units of log 2 and relative to the
// lowest cost and to the marginals, and u and v of the later steps relative to their base; steps that a problem did not
// take are 0. gradient is unrolled or envelope.
extern void (*const sinkhorn_forward[4])(const SinkhornForward&, void* room, void* stream);
extern void (*const sinkhorn_backward[4])(const SinkhornBackward&, void* room, void* stream);

}  // namespace mlot::cuda
