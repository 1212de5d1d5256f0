// Features of one side as kernels load them: widened, into tiles of shared memory. Columns of a row are neighbours.
#pragma once

#include "mlot/cuda/device.h"
#include "mlot/feature_rows.h"

namespace mlot::cuda {

// A number of rows as an int: no tile has more than it can say.
__device__ inline int clipped(int64_t rows) {
  constexpr int kMany = 1 << 30;
  return rows < kMany ? int(rows) : kMany;
}

// What a thread reads of one side's rows: the columns that become 16 bytes of the accumulator, of every step-th row.
template <class T>
class Columns {
  using A = Accumulator<T>;
  static constexpr int kCount = kLanes<A>;
  struct alignas(sizeof(T) * kCount) Few {
    T lane[kCount];
  };

 public:
  // Columns from d on, a multiple of kLanes<A>, of rows `row`, row + step, ... of a problem, up to `end`.
  __device__ Columns(const FeatureRows& side, int64_t width, int64_t problem, int64_t row, int64_t end, int step,
                     int64_t d)
      : next_(static_cast<const T*>(side.values) + problem * side.problem_stride + row * side.row_stride + d),
        stride_(step * side.row_stride),
        step_(step),
        left_(d < width ? clipped((end < side.rows ? end : side.rows) - row) : 0),
        count_(width - d < kCount ? int(width - d) : kCount),
        whole_(count_ == kCount && stride_ % kCount == 0 && reinterpret_cast<uintptr_t>(next_) % sizeof(Few) == 0) {}

  // The next kRows rows; zeros where there is no such row or column. All are read before one is widened.
  template <int kRows>
  __device__ void read(Vector<A> (&v)[kRows]) {
    Few few[kRows];
    if (whole_) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i * step_ < left_) few[i] = *reinterpret_cast<const Few*>(next_ + i * stride_);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int lane = 0; lane < kCount; ++lane) {
          if (i * step_ < left_ && lane < count_) few[i].lane[lane] = next_[i * stride_ + lane];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) {
        v[i].lane[lane] = i * step_ < left_ && lane < count_ ? widen(few[i].lane[lane]) : A(0);
      }
    }
    next_ += kRows * stride_;
    left_ -= kRows * step_;
  }

 private:
  const T* next_;
  int64_t stride_;   // to what is read next
  int step_, left_;  // rows
  int count_;        // columns that there are
  bool whole_;       // in every row they are one aligned vector
};

template <class A>
__device__ inline bool is_finite(const Vector<A>& v) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kLanes<A>; ++i) finite &= v.lane[i] - v.lane[i] == 0;
  return finite;
}

// Writes a thread's columns to rows `first`, first + step, ... below `rows` of a tile in shared memory, from `tile` on.
// Returns whether all are finite.
template <class T, class A>
__device__ inline bool fill_tile(Columns<T> columns, int first, int step, int rows, A* tile, int pitch) {
  constexpr int kBatch = kLanes<A>;  // rows that are read at once
  bool finite = true;
  for (int start = first; start < rows; start += kBatch * step) {
    Vector<A> v[kBatch];
    columns.read(v);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (start + i * step < rows) *reinterpret_cast<Vector<A>*>(tile + (start + i * step) * pitch) = v[i];
      finite &= is_finite(v[i]);
    }
  }
  return finite;
}

}  // namespace mlot::cuda
