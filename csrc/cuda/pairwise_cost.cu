// pairwise_cost on a GPU, for L1: a block owns a tile of pairs, walks chunks of features that are widened into shared
// memory once, and keeps its sums in registers.
#include "mlot/cuda/pairwise_cost.h"

#include "mlot/cuda/features.h"
#include "mlot/cuda/launch.h"

namespace mlot::cuda {
inline namespace pairwise_cost_kernels {

constexpr int kEach = 4;              // rows and columns whose sums a thread keeps
constexpr unsigned kFewThreads = 64;  // of a block whose problem is small

// Features of a chunk. A cost is the sum of the chunks' sums, so that its error does not grow with D.
template <class A>
constexpr int kChunk = 256 / int(sizeof(A));
constexpr int kLoading = 16;  // threads that load a chunk of a row

// Rows of a tile begin an odd number of 16 bytes apart: threads that are neighbours read neighbouring rows at once.
template <class A>
constexpr int kPitch = kChunk<A> + kLanes<A>;

// The tile of pairs that a block owns. A thread has every down-th row and every across-th column of it.
struct PairTile {
  int across, down;  // threads
  int rows, columns;

  __host__ __device__ explicit PairTile(unsigned threads)
      : across(threads > kFewThreads ? 16 : 8),
        down(int(threads) / across),
        rows(down * kEach),
        columns(across * kEach) {}
};

// Owns a tile of one problem's pairs with a block: reads the features of its rows and columns, chunk by chunk, and
// writes their costs. A cost depends on its two vectors alone, never on the tile: the terms of a chunk are added in
// their order, then the chunks.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, 2)
    costs(PairwiseCostForward call, unsigned tiles_down, unsigned tiles_across) {
  MLOT_SHARED_MEMORY(A, shared);  // a chunk of the tile's rows of x, behind it of those of y
  const PairTile tile(blockDim.x);
  const int64_t problem = blockIdx.x / (tiles_down * tiles_across);
  const int64_t row = int64_t(blockIdx.x / tiles_across % tiles_down) * tile.rows;
  const int64_t column = int64_t(blockIdx.x % tiles_across) * tile.columns;
  const int my_row = int(threadIdx.x) / tile.across, my_column = int(threadIdx.x) % tile.across;
  const int loads_from = int(threadIdx.x) / kLoading, loads_at = int(threadIdx.x) % kLoading * kLanes<A>;
  A total[kEach][kEach] = {};
  for (int64_t first = 0; first < call.width; first += kChunk<A>) {
    const int64_t left = call.width - first;
    const int features = left < kChunk<A> ? int(left) : kChunk<A>;
    if (first != 0) __syncthreads();  // all have read the chunk before
    if (loads_at < features) {
      const auto load = [&](const FeatureRows& side, int64_t tile_row, int rows, A* to) {
        const int step = int(blockDim.x) / kLoading;
        const Columns<T> columns(side, call.width, problem, tile_row + loads_from, tile_row + rows, step,
                                 first + loads_at);
        fill_tile(columns, loads_from, step, rows, to + loads_at, kPitch<A>);
      };
      load(call.x, row, tile.rows, shared);
      load(call.y, column, tile.columns, shared + tile.rows * kPitch<A>);
    }
    __syncthreads();
    A part[kEach][kEach] = {};
    for (int d = 0; d < features; d += kLanes<A>) {  // behind the last feature both sides are 0
      Vector<A> x[kEach], y[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int x_row = my_row + i * tile.down, y_row = tile.rows + my_column + i * tile.across;
        x[i] = *reinterpret_cast<const Vector<A>*>(shared + x_row * kPitch<A> + d);
        y[i] = *reinterpret_cast<const Vector<A>*>(shared + y_row * kPitch<A> + d);
      }
#pragma unroll
      for (int lane = 0; lane < kLanes<A>; ++lane) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) part[i][j] += fabs(x[i].lane[lane] - y[j].lane[lane]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) total[i][j] += part[i][j];
    }
  }
  A* const cost = static_cast<A*>(call.cost) + problem * call.x.rows * call.y.rows;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t r = row + my_row + i * tile.down;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t c = column + my_column + j * tile.across;
      if (r < call.x.rows && c < call.y.rows) cost[r * call.y.rows + c] = total[i][j];
    }
  }
}

// Large tiles read their features less often; small ones are for problems that would leave most of a GPU idle. No bit
// of a cost depends on the choice.
template <class T>
void launch_forward(const PairwiseCostForward& call, void* stream) {
  using A = Accumulator<T>;
  constexpr int64_t kManyBlocks = 256;
  const int64_t M = call.x.rows, N = call.y.rows;
  const PairTile large(kThreads);
  const bool many = call.problems * pieces(M, large.rows) * pieces(N, large.columns) >= kManyBlocks;
  const unsigned threads = threads_of_a_block(many ? kThreads : kFewThreads);
  const PairTile tile(threads);
  const int64_t down = pieces(M, tile.rows), across = pieces(N, tile.columns);
  const unsigned bytes = unsigned((tile.rows + tile.columns) * kPitch<A> * sizeof(A));
  launch(costs<T>, Shape{call.problems * down * across, threads, 1, bytes}, stream, call, unsigned(down),
         unsigned(across));
}

}  // namespace pairwise_cost_kernels

extern const PairwiseCost pairwise_cost = {
    {launch_forward<float>, launch_forward<bfloat16>, launch_forward<float16>, launch_forward<double>}};

}  // namespace mlot::cuda
