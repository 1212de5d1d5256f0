// Transport problems as kernels take them, on a CPU and on a GPU; see mlot_kernels/ops/sinkhorn/README.md.
#pragma once

#include <cstdint>

namespace mlot {

enum class Marginals { uniform, unit, given };
enum class Domain { automatic, log, scaling };
enum class TransportGradient { unrolled, envelope, implicit };

// mlot_kernels.transport.TransportOptions for kernels. Tensors are dense, of the accumulator's dtype A, or null.
struct TransportOptions {
  int64_t problems, rows, columns;              // B, M, N
  const void *row_marginal, *column_marginal;   // [B, M] and [B, N]: both or neither
  const int64_t *row_lengths, *column_lengths;  // [B]
  const void* column_weight;                    // [B, N]
  double epsilon;
  int64_t iterations;  // L
  Marginals marginals;
  double tolerance;
  Domain domain;
  TransportGradient gradient;
  int64_t threads;  // of a CPU: decides what is shared among them, never a bit of the result
};

// Scalars of A, all written in full. A history is null but for unrolled gradients, and means something to the backward
// of the same kernels alone: see cpu/sinkhorn.h and cuda/sinkhorn.h.
struct TransportOutputs {
  void *transported, *regularized;         // [B]
  void *row_potential, *column_potential;  // [B, M], [B, N]
  int64_t* done;                           // [B]
  void *row_history, *column_history;      // [B, L, M], [B, L, N]
};

struct TransportSaved {
  const void *row_potential, *column_potential;
  const int64_t* done;
  const void *row_history, *column_history;
};

struct TransportUpstream {
  const void *transported, *regularized;  // [B]
};

// Of the marginals and the weight, of A, written in full.
struct TransportGradients {
  void *row_marginal, *column_marginal, *column_weight;  // [B, M], [B, N], [B, N]
};

// Elements of T, one of float, bfloat16, float16 and double; any strides, in elements.
struct CostMatrices {
  const void* values;  // [B, M, N]
  int64_t batch_stride, row_stride, column_stride;
};

struct SinkhornForward {
  CostMatrices cost;
  TransportOptions options;
  void* plan;  // [B, M, N] of A, or null
  TransportOutputs outputs;
};

struct SinkhornBackward {
  TransportUpstream upstream;
  const void* grad_plan;  // [B, M, N] of A, or null
  CostMatrices cost;
  TransportOptions options;
  TransportSaved saved;
  void* grad_cost;  // [B, M, N] of A
  TransportGradients gradients;
};

}  // namespace mlot
