// Rows whose dtype a kernel learns when it runs: the dtypes of two sides make sixteen pairs, and no kernel of its own
// for any of them. B is the accumulator of both, double where either side is float64; branches are the same for a
// whole block.
#pragma once

#include "mlot/cuda/row_statistics.h"

namespace mlot::cuda {

// Columns that a thread reads at once: 16 bytes of 16-bit floats, two times 16 of float32. In double there are
// registers for one.
template <class B>
constexpr int kColumnsAtOnce = sizeof(B) == 8 ? 1 : 8;

// Calls use(T()) with the dtype's T.
template <class B, class Use>
__device__ inline void with_dtype(Dtype dtype, Use use) {
  if (dtype == Dtype::float32) {
    use(float());
  } else if (dtype == Dtype::bfloat16) {
    use(bfloat16());
  } else if (dtype == Dtype::float16) {
    use(float16());
  } else {
    if constexpr (sizeof(B) == 8) use(double());
  }
}

__host__ __device__ inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// A row of logits in device memory; a null pointer where none counts. For what is written for elements of T a pointer
// to an AnyRow stands in the place of a pointer to the first of them: its accumulator is B, and this is how it is read.
template <class B>
struct AnyRow {
  const void* logits;
  Dtype dtype;
};

template <class B>
struct AccumulatorOf<AnyRow<B>> {
  using type = B;
};
template <class B>
constexpr int kLanes<AnyRow<B>> = kColumnsAtOnce<B>;

// The row of `slot`.
template <class B>
__device__ inline AnyRow<B> any_row(const LogitsRows& rows, Dtype dtype, int64_t slot) {
  const int64_t position = rows.index[slot];
  if (position < 0) return {nullptr, dtype};
  const int64_t offset = slot / rows.slots * rows.batch_stride + position * rows.row_stride;
  return {static_cast<const unsigned char*>(rows.values) + offset * bytes_of(dtype), dtype};
}

// Columns `first`, `first` + 1, ...; `fill` where a column is not in [0, end).
template <class B>
__device__ inline void load(const AnyRow<B>* row, int64_t first, int64_t end, Accumulator<AnyRow<B>> fill,
                            Accumulator<AnyRow<B>> (&x)[kColumnsAtOnce<B>]) {
  with_dtype<B>(row->dtype, [&](auto element) {
    using T = decltype(element);
    const T* const logits = static_cast<const T*>(row->logits);
    if constexpr (kColumnsAtOnce<B> % kLanes<T> == 0) {
#pragma unroll
      for (int part = 0; part < kColumnsAtOnce<B>; part += kLanes<T>) {
        Accumulator<T> lanes[kLanes<T>];
        load(logits, first + part, end, Accumulator<T>(fill), lanes);
#pragma unroll
        for (int i = 0; i < kLanes<T>; ++i) x[part + i] = B(lanes[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumnsAtOnce<B>; ++i) {
        x[i] = first + i >= 0 && first + i < end ? B(widen(logits[first + i])) : fill;
      }
    }
  });
}

// One column; NaN where it is not in [0, end).
template <class B>
__device__ inline B read_column(const AnyRow<B>& row, int64_t column, int64_t end) {
  B x = B(NAN);
  if (column < 0 || column >= end) return x;
  with_dtype<B>(row.dtype,
                [&](auto element) { x = B(widen(static_cast<const decltype(element)*>(row.logits)[column])); });
  return x;
}

// Writes x to columns `first`, `first` + 1, ... of a row, those in [0, end). Whole vectors must be aligned.
template <class B>
__device__ inline void write_row(void* row, Dtype dtype, int64_t first, int64_t end, const B (&x)[kColumnsAtOnce<B>]) {
  with_dtype<B>(dtype, [&](auto element) {
    using T = decltype(element);
    T* const out = static_cast<T*>(row);
    if constexpr (kColumnsAtOnce<B> % kLanes<T> == 0) {
#pragma unroll
      for (int part = 0; part < kColumnsAtOnce<B>; part += kLanes<T>) {
        Accumulator<T> lanes[kLanes<T>];
#pragma unroll
        for (int i = 0; i < kLanes<T>; ++i) lanes[i] = Accumulator<T>(x[part + i]);
        store(out, first + part, end, lanes);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kColumnsAtOnce<B>; ++i) {
        if (first + i >= 0 && first + i < end) narrow(Accumulator<T>(x[i]), out[first + i]);
      }
    }
  });
}

// Scalars of rows [B, A], in the dtype of their accumulator; 0 where there are none.
__device__ inline double scalar_at(const void* scalars, Dtype dtype, int64_t slot) {
  return dtype == Dtype::float64 ? at<double>(scalars, slot) : double(at<float>(scalars, slot));
}
__device__ inline void put_scalar(void* scalars, Dtype dtype, int64_t slot, double x) {
  if (dtype == Dtype::float64) {
    put<double>(scalars, slot, x);
  } else {
    put<float>(scalars, slot, x);
  }
}
__device__ inline double rounded_to_accumulator(Dtype dtype, double x) {
  return dtype == Dtype::float64 ? x : double(float(x));
}

}  // namespace mlot::cuda
