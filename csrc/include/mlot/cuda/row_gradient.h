// What writes the gradient of logits: a block owns a stretch of one row's, aligned as it lies in memory.
#pragma once

#include "mlot/cuda/launch.h"
#include "mlot/cuda/rows.h"

namespace mlot::cuda {

constexpr int kGradientBatch = 2;  // vectors of a thread

template <class T>
using GradientVectors = Accumulator<T>[kGradientBatch][kLanes<T>];

template <class T>
struct Stretch {
  int64_t slot;  // -1: the row does not count
  T* out;        // its gradient
  int64_t first, last;
};

// Reads a stretch's logits once and writes its gradient once: what `gradient(slot, row, begin, step, x)` makes of the
// vectors x, vector i of columns begin + i step on. Zeros where the row does not count; behind the distribution's
// columns logits are -inf and their gradient is to be 0.
template <class T, class Gradient>
__device__ inline Stretch<T> write_stretch(const LogitsRows& rows, const int32_t* slot_of, void* grad_values,
                                           int64_t stretches, Gradient gradient) {
  const int64_t place = blockIdx.x / stretches, step = int64_t(blockDim.x) * kLanes<T>;
  T* out = static_cast<T*>(grad_values) + place * rows.width;
  const int64_t first = blockIdx.x % stretches * kGradientBatch * step - columns_past_alignment(out);
  const int64_t begin = first + threadIdx.x * kLanes<T>;
  const int64_t slot = slot_of[place];
  GradientVectors<T> x = {};
  if (slot >= 0) {
    const T* row = row_of<T>(rows, slot);
#pragma unroll
    for (int i = 0; i < kGradientBatch; ++i) {
      load(row, begin + i * step, rows.vocab_size, Accumulator<T>(-INFINITY), x[i]);
    }
    gradient(slot, row, begin, step, x);
  }
#pragma unroll
  for (int i = 0; i < kGradientBatch; ++i) store(out, begin + i * step, rows.width, x[i]);
  return {slot, out, first, first + kGradientBatch * step};
}

// Launches a kernel of write_stretch, which gets the number of stretches of a row.
template <class T, class Call>
void launch_stretches(void (*kernel)(Call, int64_t), const Call& call, void* stream) {
  write_slots(call.rows, call.slot_of, stream);
  const unsigned threads = threads_of_a_block(kThreads);
  const int64_t each = int64_t(threads) * kGradientBatch * kLanes<T>;
  const int64_t stretches = (call.rows.width + kLanes<T> - 1 + each - 1) / each;  // wherever the row starts
  launch(kernel, Shape{call.rows.all_positions() * stretches, threads, 1, 0}, stream, call, stretches);
}

// Launches a kernel with a thread for each slot.
template <class Call>
void launch_slots(void (*kernel)(Call), const Call& call, void* stream) {
  const unsigned threads = threads_of_a_block(kThreads);
  launch(kernel, Shape{(call.rows.all_slots() + threads - 1) / threads, threads, 1, 0}, stream, call);
}

}  // namespace mlot::cuda
