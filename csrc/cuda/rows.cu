#include "mlot/cuda/rows.h"

#include "mlot/cuda/launch.h"

namespace mlot::cuda {
inline namespace rows_kernels {

// Owns a sequence with a block.
__global__ void slots_of_positions(LogitsRows rows, int32_t* slot_of) {
  const int64_t sequence = blockIdx.x;
  for (int64_t t = threadIdx.x; t < rows.positions; t += blockDim.x) slot_of[sequence * rows.positions + t] = -1;
  __syncthreads();
  for (int64_t a = threadIdx.x; a < rows.slots; a += blockDim.x) {
    const int64_t slot = sequence * rows.slots + a, position = rows.index[slot];
    if (position >= 0) slot_of[sequence * rows.positions + position] = int32_t(slot);
  }
}

}  // namespace rows_kernels

void write_slots(const LogitsRows& rows, int32_t* slot_of, void* stream) {
  launch(slots_of_positions, Shape{rows.sequences, threads_of_a_block(kThreads), 1, 0}, stream, rows, slot_of);
}

}  // namespace mlot::cuda
