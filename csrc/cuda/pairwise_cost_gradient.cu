// The gradient of L1 costs on a GPU: a block owns a tile of one side's gradient, walks chunks of the other side's rows
// that are widened into shared memory once, and keeps its sums in registers.
#include <algorithm>

#include "mlot/cuda/features.h"
#include "mlot/cuda/launch.h"
#include "mlot/cuda/pairwise_cost.h"

namespace mlot::cuda {
inline namespace pairwise_cost_gradient_kernels {

constexpr int kEach = 4;             // rows whose sums a thread keeps
constexpr int kTerms = 32;           // of the other side's rows: a chunk; a gradient is a sum of their sums
constexpr int64_t kMostAcross = 16;  // threads along the features of a tile
constexpr unsigned kMostRows = 128;  // of a tile
constexpr unsigned kGradientThreads = 128;
constexpr int64_t kBlocksOfAProblem = 128;  // that a side's gradient is split over, if it can be

// How a side's gradient is shared out. A block has a tile of it, over one part of the other side's rows; a thread has
// 16 bytes of the accumulator of kEach rows.
struct GradientTiles {
  unsigned features, rows;  // of a tile: whole threads' shares
  unsigned tiles_across, tiles_down;
  int64_t part_rows, parts;

  GradientTiles(int64_t own_rows, int64_t others, int64_t width, int lanes, unsigned threads) {
    const int64_t vectors = std::max<int64_t>(1, pieces(width, lanes));
    tiles_across = unsigned(pieces(vectors, kMostAcross));
    const unsigned across = unsigned(pieces(vectors, tiles_across));
    features = across * unsigned(lanes);
    rows = std::min(threads / across * kEach, kMostRows);
    tiles_down = unsigned(pieces(own_rows, rows));
    const int64_t tiles = std::max<int64_t>(1, int64_t(tiles_across) * tiles_down);
    const int64_t wanted = pieces(kBlocksOfAProblem, tiles), chunks = pieces(others, kTerms);
    part_rows = std::max<int64_t>(1, pieces(chunks, wanted)) * kTerms;
    parts = std::max<int64_t>(1, pieces(others, part_rows));
  }

  // Rows of the tile of weights begin an odd number of kEach apart: those of x are written down its columns.
  __host__ __device__ unsigned weights_pitch() const { return (rows / kEach | 1) * kEach; }

  // Elements of shared memory: a chunk's features and weights.
  unsigned shared_elements() const { return kTerms * (features + weights_pitch()); }
};

// What a thread's rows weigh with one row of the other side.
template <class A>
struct alignas(16) RowWeights {
  A of[kEach];
};

// The weights of rows [row, row + rows) of the own side with [other, other + kTerms) of the other, to a tile [kTerms,
// rows] of shared memory; zeros where a side has no row. Returns whether all that this thread has read is finite.
//
// Neighbouring threads read neighbours in memory: a line of them is a row of the pairs' matrix.
template <class A>
__device__ inline bool load_weights(const PairwiseCostBackward& call, int64_t problem, int64_t row, int rows,
                                    int64_t other, A* tile, int pitch) {
  constexpr int kBatch = 5;  // half of what a thread has to read, for 50 features
  const A* from = static_cast<const A*>(call.grad) + problem * call.own.rows * call.other.rows + row * call.own_stride +
                  other * call.other_stride;
  const bool along_rows = call.own_stride == 1;  // a line is one row of the other side, and else of the own
  const int own_left = clipped(call.own.rows - row), others_left = clipped(call.other.rows - other);
  const int places_left = along_rows ? own_left : others_left, lines_left = along_rows ? others_left : own_left;
  const int64_t line_stride = along_rows ? call.other_stride : call.own_stride;
  const int places = along_rows ? rows : kTerms, lines = along_rows ? kTerms : rows;
  const int place_pitch = along_rows ? 1 : pitch, line_pitch = along_rows ? pitch : 1;
  const int next_place = int(blockDim.x) % places, next_line = int(blockDim.x) / places;
  int place = int(threadIdx.x) % places, line = int(threadIdx.x) / places;
  bool finite = true;
  while (line < lines) {
    A weight[kBatch];
    int to[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      to[i] = line < lines ? line * line_pitch + place * place_pitch : -1;
      weight[i] = line < lines_left && place < places_left ? from[line * line_stride + place] : A(0);
      place += next_place, line += next_line;
      if (place >= places) place -= places, ++line;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (to[i] >= 0) tile[to[i]] = weight[i];
      finite &= weight[i] - weight[i] == 0;
    }
  }
  return finite;
}

// Adds what `others` rows of the other side pass on. Where features and weights are finite, two comparisons and two
// additions of which at most one is made: 4 instructions, and no difference. Else the definition's own product: a
// difference, or a weight times 0, may be NaN. Of finite numbers both make the same bits.
template <bool kFinite, class A>
__device__ inline void add_signs(const Vector<A> (&own)[kEach], const A* other, int other_pitch, const A* weights,
                                 int weights_pitch, int others, Vector<A> (&sums)[kEach]) {
  for (int j = 0; j < others; ++j) {
    const auto y = *reinterpret_cast<const Vector<A>*>(other + j * other_pitch);
    const auto weight = *reinterpret_cast<const RowWeights<A>*>(weights + j * weights_pitch);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
#pragma unroll
      for (int lane = 0; lane < kLanes<A>; ++lane) {
        if constexpr (kFinite) {
          if (own[r].lane[lane] > y.lane[lane]) sums[r].lane[lane] += weight.of[r];
          if (own[r].lane[lane] < y.lane[lane]) sums[r].lane[lane] -= weight.of[r];
        } else {
          const A difference = own[r].lane[lane] - y.lane[lane];
          sums[r].lane[lane] += weight.of[r] * (difference > 0 ? A(1) : difference < 0 ? A(-1) : difference);
        }
      }
    }
  }
}

// Owns a tile of one side's gradient, over one part of the other side's rows, with a block: reads its features once,
// and of each chunk of the other side's rows their features and the pairs' weights; writes the tile's sums, the
// gradient itself where there is one part. The terms of a chunk are added in their order, then the chunks of a part,
// then the parts (`add_parts`).
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kGradientThreads, 4) gradient(PairwiseCostBackward call, GradientTiles tiles) {
  MLOT_SHARED_MEMORY(A, shared);
  const int features = int(tiles.features), rows = int(tiles.rows), weights_pitch = int(tiles.weights_pitch());
  A* const weights = shared + kTerms * features;
  const unsigned tile = blockIdx.x % (tiles.tiles_across * tiles.tiles_down);
  const unsigned part_of_all = blockIdx.x / (tiles.tiles_across * tiles.tiles_down);
  const int64_t problem = part_of_all / unsigned(tiles.parts), part = part_of_all % unsigned(tiles.parts);
  const int64_t row = int64_t(tile / tiles.tiles_across) * rows;
  const int across = features / kLanes<A>, down = int(blockDim.x) / across, group = int(threadIdx.x) / across;
  const bool owns = group < rows / kEach;  // the last threads may be too few for all features of a row
  const int my_row = owns ? group * kEach : 0, my_column = int(threadIdx.x) % across * kLanes<A>;
  const int64_t d = int64_t(tile % tiles.tiles_across) * features + my_column;

  Vector<A> own[kEach], total[kEach] = {};
  Columns<T>(call.own, call.width, problem, row + my_row, row + rows, 1, d).read(own);
  bool finite = true;
#pragma unroll
  for (int r = 0; r < kEach; ++r) finite &= is_finite(own[r]);
  const int64_t begin = part * tiles.part_rows;
  const int64_t end = begin + tiles.part_rows < call.other.rows ? begin + tiles.part_rows : call.other.rows;
  for (int64_t other = begin; other < end; other += kTerms) {
    const int others = end - other < kTerms ? int(end - other) : kTerms;
    if (other != begin) __syncthreads();  // all have read the chunk before
    if (group < down) {
      const Columns<T> columns(call.other, call.width, problem, other + group, other + others, down, d);
      finite &= fill_tile(columns, group, down, others, shared + my_column, features);
    }
    finite &= load_weights(call, problem, row, rows, other, weights, weights_pitch);
    Vector<A> sums[kEach] = {};
    if (__syncthreads_and(finite)) {
      add_signs<true>(own, shared + my_column, features, weights + my_row, weights_pitch, others, sums);
    } else {
      add_signs<false>(own, shared + my_column, features, weights + my_row, weights_pitch, others, sums);
    }
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
#pragma unroll
      for (int lane = 0; lane < kLanes<A>; ++lane) total[r].lane[lane] += sums[r].lane[lane];
    }
  }
  if (!owns) return;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int64_t i = row + my_row + r, at = (problem * call.own.rows + i) * call.width + d;
#pragma unroll
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      if (i >= call.own.rows || d + lane >= call.width) continue;
      if (tiles.parts > 1) {
        static_cast<A*>(call.parts)[part * call.problems * call.own.rows * call.width + at + lane] =
            total[r].lane[lane];
      } else {
        narrow(total[r].lane[lane], static_cast<T*>(call.gradient)[at + lane]);
      }
    }
  }
}

// Owns an element of one side's gradient with each thread: adds its parts, in their order.
template <class T, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads) add_parts(PairwiseCostBackward call, int64_t elements, int64_t parts) {
  const int64_t element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= elements) return;
  const A* sums = static_cast<const A*>(call.parts) + element;
  A all = sums[0];
  for (int64_t part = 1; part < parts; ++part) all += sums[part * elements];
  narrow(all, static_cast<T*>(call.gradient)[element]);
}

template <class T>
GradientTiles tiles_of(int64_t rows, int64_t others, int64_t width) {
  return GradientTiles(rows, others, width, kLanes<Accumulator<T>>, threads_of_a_block(kGradientThreads));
}

template <class T>
int64_t parts_of(int64_t rows, int64_t others, int64_t width) {
  return tiles_of<T>(rows, others, width).parts;
}

template <class T>
void launch_gradient(const PairwiseCostBackward& call, void* stream) {
  const int64_t elements = call.problems * call.own.rows * call.width;
  if (elements == 0) return;
  const GradientTiles tiles = tiles_of<T>(call.own.rows, call.other.rows, call.width);
  const unsigned bytes = tiles.shared_elements() * unsigned(sizeof(Accumulator<T>));
  launch(gradient<T>,
         Shape{call.problems * tiles.parts * tiles.tiles_down * tiles.tiles_across,
               threads_of_a_block(kGradientThreads), 1, bytes},
         stream, call, tiles);
  if (tiles.parts == 1) return;
  const unsigned threads = threads_of_a_block(kThreads);
  launch(add_parts<T>, Shape{pieces(elements, threads), threads, 1, 0}, stream, call, elements, tiles.parts);
}

}  // namespace pairwise_cost_gradient_kernels

extern const PairwiseCostGradient pairwise_cost_gradient = {
    {launch_gradient<float>, launch_gradient<bfloat16>, launch_gradient<float16>, launch_gradient<double>},
    {parts_of<float>, parts_of<bfloat16>, parts_of<float16>, parts_of<double>}};

}  // namespace mlot::cuda
