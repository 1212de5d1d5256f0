#include "mlot/cuda/select.h"

#include "mlot/cuda/largest.h"
#include "mlot/cuda/launch.h"

namespace mlot::cuda {
inline namespace select_kernels {

struct RowsOfMatrix {
  const void* values;
  int64_t width;

  template <class T>
  __device__ const T* row(int64_t i) const {
    return static_cast<const T*>(values) + i * width;
  }
};

struct RowsOfSlots {
  LogitsRows rows;
  const void* log_total;

  template <class T>
  __device__ const T* row(int64_t i) const {
    const auto total = at<Accumulator<T>>(log_total, i);
    return total == total ? row_of<T>(rows, i) : nullptr;
  }
};

struct SelectMemory {
  DigitMemory digits;
  unsigned found;  // by the cluster; of the first block
};

// Owns a row with a cluster: reads it once for each digit of the k-th largest, and once more to collect those that
// reach it; counting the larger ones among them gives each its place.
template <class T, class Rows, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3) select(Rows rows, Selection to) {
  MLOT_SHARED_MEMORY(SelectMemory, shared);
  const int64_t number = blockIdx.x / cluster_size();
  const T* row = rows.template row<T>(number);
  const ColumnOrder<T> order{to.column_mask, to.end};
  Order<A>* const found = static_cast<Order<A>*>(to.found) + number * to.k;
  const auto for_columns = [&](auto use) {
    if (!row) {
      const int64_t stride = int64_t(cluster_size()) * blockDim.x;
      for (int64_t column = int64_t(cluster_rank()) * blockDim.x + threadIdx.x; column < to.end; column += stride) {
        use(A(0), column);
      }
      return;
    }
    for_vectors<2>(row, to.end, [&](int64_t first, int64_t step, const A(&x)[2][kLanes<T>]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          const int64_t column = first + i * step + lane;
          if (column < to.end) use(x[i][lane], column);
        }
      }
    });
  };
  collect_largest(shared->digits, &shared->found, order, to.k, found, for_columns);
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int64_t i = cluster_rank() * warps + threadIdx.x / kWarp; i < to.k; i += cluster_size() * warps) {
    const unsigned place = place_among(found, to.k, found[i]);
    for (int64_t copy = lane; copy < to.copies; copy += kWarp) {
      to.columns[(number * to.copies + copy) * to.k + place] = order.column(found[i]);
    }
  }
}

template <class T, class Rows>
void launch_select(const Rows& rows, const Selection& to, void* stream) {
  static_assert(sizeof(Order<Accumulator<T>>) <= kFoundBytes);
  const RowShape shape = shape_of_row(to.end, kLanes<T>);
  launch(select<T, Rows>, Shape{to.rows * shape.cluster, shape.threads, shape.cluster, sizeof(SelectMemory)}, stream,
         rows, to);
}

}  // namespace select_kernels

template <class T>
void select_of_matrix(const void* values, int64_t width, const Selection& to, void* stream) {
  launch_select<T>(RowsOfMatrix{values, width}, to, stream);
}

template <class T>
void select_of_slots(const LogitsRows& rows, const void* log_total, const Selection& to, void* stream) {
  launch_select<T>(RowsOfSlots{rows, log_total}, to, stream);
}

template void select_of_matrix<float>(const void*, int64_t, const Selection&, void*);
template void select_of_matrix<double>(const void*, int64_t, const Selection&, void*);
template void select_of_slots<float>(const LogitsRows&, const void*, const Selection&, void*);
template void select_of_slots<bfloat16>(const LogitsRows&, const void*, const Selection&, void*);
template void select_of_slots<float16>(const LogitsRows&, const void*, const Selection&, void*);
template void select_of_slots<double>(const LogitsRows&, const void*, const Selection&, void*);

}  // namespace mlot::cuda
