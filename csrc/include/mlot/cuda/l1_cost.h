// L1 costs of one transport problem's pairs of features, and their gradient, by the cluster that owns the problem.
#pragma once

#include "mlot/cuda/transport.h"
#include "mlot/feature_rows.h"

namespace mlot::cuda {

constexpr int kRowsAtOnce = 4;  // of a warp: one reading of the other side serves all of them

// One problem's side.
template <class T>
struct Features {
  const T* values;
  int64_t row_stride, column_stride;

  __device__ Features(const FeatureRows& side, int64_t problem)
      : values(static_cast<const T*>(side.values) + problem * side.problem_stride),
        row_stride(side.row_stride),
        column_stride(side.column_stride) {}

  __device__ Accumulator<T> at(int64_t row, int64_t column) const {
    return widen(values[row * row_stride + column * column_stride]);
  }
};

// Writes this block's rows of the costs, [rows, columns]. The tile takes as many features of all columns as it has
// rows; sums over them are added up in their order.
template <class T, bool kOnChip, class A = Accumulator<T>>
__device__ void write_l1_costs(const Problem<A, kOnChip>& problem, const Features<T>& x, const Features<T>& y,
                               int64_t width, A* costs) {
  if (problem.rows == 0) return;
  const int columns = problem.columns, lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int64_t first = 0;
  do {
    const int64_t left = width - first;
    const int chunk = int(left < problem.shape.tile_rows ? left : problem.shape.tile_rows);
    for (int j = warp; j < columns; j += warps) {
      for (int d = lane; d < chunk; d += kWarp) {
        problem.row_of_tile(d)[j] = problem.b[j] != 0 ? y.at(j, first + d) : A(0);
      }
    }
    __syncthreads();
    for (int row = warp * kRowsAtOnce; row < problem.rows; row += warps * kRowsAtOnce) {
      for (int j = lane; j < columns; j += kWarp) {
        A sum[kRowsAtOnce] = {};
        for (int d = 0; d < chunk; ++d) {
          const A other = problem.row_of_tile(d)[j];
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) {
            const bool counts = row + i < problem.rows && problem.a[row + i] != 0;
            sum[i] += fabs((counts ? x.at(problem.first_row + row + i, first + d) : A(0)) - other);
          }
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
          if (row + i >= problem.rows) continue;
          A& to = costs[int64_t(row + i) * columns + j];
          to = first == 0 ? sum[i] : to + sum[i];
        }
      }
    }
    __syncthreads();
    first += chunk;
  } while (first < width);
}

// Writes the gradient of the side's rows `first` to `first` + `count`, at most kRowsAtOnce, by one warp: the sum of
// weight sign(own - other) over the other side's rows, in their order. others(column, use) calls use(its feature,
// weight of this side's row i) for those that count; the difference itself stands for the sign of 0 and of NaN.
template <class T, class Counts, class Others, class A = Accumulator<T>>
__device__ void write_l1_gradient(const Features<T>& own, int64_t first, int count, int64_t width, Counts counts,
                                  Others others, T* gradient) {
  for (int64_t d = threadIdx.x % kWarp; d < width; d += kWarp) {
    A mine[kRowsAtOnce], sum[kRowsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) mine[i] = i < count && counts(i) ? own.at(first + i, d) : A(0);
    others(d, [&](A other, auto weight) {
#pragma unroll
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const A difference = mine[i] - other;
        sum[i] += weight(i < count ? i : 0) * (difference > 0 ? A(1) : difference < 0 ? A(-1) : difference);
      }
    });
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (i < count) narrow(counts(i) ? sum[i] : A(0), gradient[(first + i) * width + d]);
    }
  }
}

// The gradient of this block's rows of x, of its rows of dl/dC.
template <class T, bool kOnChip, class A = Accumulator<T>>
__device__ void write_gradient_of_rows(const Problem<A, kOnChip>& problem, const Features<T>& x, const Features<T>& y,
                                       int64_t width, const A* grad_cost, T* gradient) {
  const int step = blockDim.x / kWarp * kRowsAtOnce;
  for (int row = threadIdx.x / kWarp * kRowsAtOnce; row < problem.rows; row += step) {
    const int left = problem.rows - row;
    const A* const weights = grad_cost + int64_t(row) * problem.columns;
    write_l1_gradient(
        x, problem.first_row + row, left < kRowsAtOnce ? left : kRowsAtOnce, width,
        [&](int i) { return problem.a[row + i] != 0; },
        [&](int64_t d, auto use) {
          for (int j = 0; j < problem.columns; ++j) {
            if (problem.b[j] == 0) continue;
            use(y.at(j, d), [&](int i) { return weights[int64_t(i) * problem.columns + j]; });
          }
        },
        gradient);
  }
}

// The gradient of this block's share of y's rows, the problem's columns, of all blocks' rows of dl/dC. Others read this
// block's: none may end before all have come to an end.
template <class T, bool kOnChip, class A = Accumulator<T>>
__device__ void write_gradient_of_columns(const Problem<A, kOnChip>& problem, const Features<T>& x,
                                          const Features<T>& y, int64_t width, const A* grad_cost, T* gradient) {
  const int warps = blockDim.x / kWarp, warp = int(cluster_rank()) * warps + threadIdx.x / kWarp;
  const int step = int(cluster_size()) * warps * kRowsAtOnce;
  for (int j = warp * kRowsAtOnce; j < problem.columns; j += step) {
    const int left = problem.columns - j;
    write_l1_gradient(
        y, j, left < kRowsAtOnce ? left : kRowsAtOnce, width, [&](int i) { return problem.b[j + i] != 0; },
        [&](int64_t d, auto use) {
          for (unsigned rank = 0; rank < cluster_size(); ++rank) {
            const A* const weights = problem.matrix_of_peer(grad_cost, rank) + j;
            const A* const a = problem.of_peer(problem.a, rank);
            const int64_t first = int64_t(rank) * problem.shape.rows, behind = problem.options.rows - first;
            for (int row = 0; row < problem.shape.rows && row < behind; ++row) {
              if (a[row] == 0) continue;
              use(x.at(first + row, d), [&](int i) { return weights[int64_t(row) * problem.columns + i]; });
            }
          }
        },
        gradient);
  }
}

}  // namespace mlot::cuda
