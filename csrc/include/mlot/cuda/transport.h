// One transport problem on a GPU, owned by a cluster: each block has a stretch of its rows and all of its columns.
//
// Everything is made of densities D = P / (a b^T) = 2^(F + X + G) with X = (lowest - C) log2(e) / epsilon: of the
// definition's log-scalings F lacks log2 a and the problem's lowest cost, G lacks log2 b. No term of the steps, of the
// values or of the gradients then divides by a marginal:
//
//     u = 1 / (D (b v))        v = 1 / (D^T (a u))        KL(P | a b^T) = sum P log D
//
// u and v are relative to the base (F, G) of their D; where they leave [1 / kFurthest, kFurthest] the next step takes
// them in, F += log2 u, G += log2 v. What does not count has a or b 0 and D = 0; its cost is not read.
#pragma once

#include <algorithm>

#include "mlot/cuda/launch.h"
#include "mlot/transport.h"

namespace mlot::cuda {

constexpr unsigned kTransportThreads = 512;  // at most, of a block
constexpr double kWidestScaling = 80;        // range(C) / epsilon up to which "auto" scales

template <class A>
constexpr A kFurthest = sizeof(A) == 8 ? A(0x1p432) : A(0x1p43f);  // near e^300 and e^30

// Relative to where `x` lies; NaN lies nowhere.
template <class A>
__device__ inline bool is_far(A x) {
  return x > kFurthest<A> || x < 1 / kFurthest<A>;
}

__device__ inline float log_two(float x) { return log2f(x); }
__device__ inline double log_two(double x) { return log2(x); }
__device__ inline float fused(float x, float y, float z) { return fmaf(x, y, z); }
__device__ inline double fused(double x, double y, double z) { return fma(x, y, z); }
__device__ inline float smaller(float x, float y) { return fminf(x, y); }  // passes over NaN
__device__ inline double smaller(double x, double y) { return fmin(x, y); }

// What terms up to 2^`peak` are made relative to: -inf less -inf would be NaN where there is merely nothing.
template <class A>
__device__ inline A shift_of(A peak) {
  return peak == A(-INFINITY) ? A(0) : peak;
}

// 1 / total; 1 where nothing counts.
template <class A>
__device__ inline A reciprocal(A total, A marginal) {
  return marginal != 0 ? 1 / total : A(1);
}

// What a kernel's workspace has of vectors, and of matrices [rows of a block, columns] beside the tile.
struct TransportArrays {
  int of_columns, of_rows, matrices;
};

// How a problem is shared among blocks and threads. Its own shape decides, never the batch.
struct TransportShape {
  int rows;       // of a block
  int tile_rows;  // of these, as many as are worked on at a time: all, and their D stays, or fewer
  int groups;     // of threads that share a column
  int matrices;
  unsigned threads, cluster;
  bool on_chip, matrices_on_chip;  // the workspace is in shared memory, and its matrices are in it
  int64_t workspace;               // bytes, of a block

  // As many as are solved in one launch: matrices in device memory stand there for a few problems at a time, 64 MiB
  // each in float32.
  int64_t problems_at_once(const TransportOptions& options) const {
    if (matrices_on_chip) return options.problems;
    const int64_t fitting = (int64_t(1) << 24) / std::max<int64_t>(options.rows * options.columns, 1);
    return std::min(std::max<int64_t>(fitting, 1), options.problems);
  }

  // Bytes of device memory in the place of shared memory for so many problems: the matrices stand behind the rest.
  __host__ __device__ int64_t room_of_workspaces(int64_t problems) const {
    return on_chip ? 0 : problems * cluster * workspace;
  }
  int64_t room(const TransportOptions& options, int64_t problems, int64_t element) const {
    const int64_t elements = matrices_on_chip ? 0 : problems * matrices * options.rows * options.columns;
    return room_of_workspaces(problems) + elements * element;
  }
};

template <class A>
struct TransportSums {
  A moved = 0, surprise = 0, mass = 0;
};

// A block's shared memory in front of its workspace.
template <class A>
struct alignas(16) TransportMemory {
  unsigned char join[kJoin<TransportSums<A>>];
  A of_warps[kWarp];
  unsigned seen[2];   // of a step, by its parity
  unsigned rows_far;  // whether this block's u are far from 1
};

// A cluster grows until a block has 8192 elements; where its rows do not fit into shared memory beside the vectors, it
// works on fewer at a time, and where these would be too few to share among warps, in device memory.
template <class A>
inline TransportShape shape_of_problem(const TransportOptions& options, const TransportArrays& arrays) {
  constexpr int64_t kFewestRows = 8;
  const int64_t M = options.rows, N = options.columns;
  const unsigned most = most_in_a_cluster();
#ifdef __CUDACC__
  unsigned cluster = 1;
  while (cluster < most && cluster < M && M * N > 8192 * int64_t(cluster)) cluster *= 2;
#else
  const unsigned cluster = most;
#endif
  const int64_t rows = (M + cluster - 1) / cluster;
  unsigned usual = kWarp;
  while (usual < kTransportThreads && rows * N > 16 * int64_t(usual)) usual *= 2;
  const unsigned threads = threads_of_a_block(usual);
  const int64_t column_warps = std::max<int64_t>((N + kWarp - 1) / kWarp, 1);
  const int64_t groups = std::max<int64_t>(threads / kWarp / column_warps, 1);
  const int64_t vectors = (arrays.of_columns + 1) * N + (arrays.of_rows + 1) * rows + 2 * (groups * N + 1);
  const int64_t matrices = arrays.matrices * rows * N;
  const int64_t space = (int64_t(most_shared_bytes()) - int64_t(sizeof(TransportMemory<A>))) / int64_t(sizeof(A)) - 1;
  const bool whole = vectors + matrices + rows * N <= space;
  const int64_t fitting = whole || N == 0 ? rows : (space - vectors) / N;
  const bool on_chip = whole || (vectors <= space && fitting >= std::min(rows, kFewestRows));
  const int64_t tile_rows = std::min(rows, on_chip ? fitting : std::max<int64_t>(threads / kWarp, kFewestRows));
  const int64_t elements = vectors + tile_rows * N + (whole ? matrices : 0);
  return {.rows = int(rows),
          .tile_rows = int(tile_rows),
          .groups = int(groups),
          .matrices = arrays.matrices,
          .threads = threads,
          .cluster = cluster,
          .on_chip = on_chip,
          .matrices_on_chip = whole,
          .workspace = (elements + 1) / 2 * 2 * int64_t(sizeof(A))};
}

template <class A>
inline Shape launch_shape(int64_t problems, const TransportShape& shape) {
  return {problems * shape.cluster, shape.threads, shape.cluster,
          unsigned(sizeof(TransportMemory<A>) + (shape.on_chip ? shape.workspace : 0))};
}

// Calls use(first, problems) for the problems that are solved in one launch.
template <class Use>
inline void for_problems(const TransportOptions& options, const TransportShape& shape, Use use) {
  const int64_t each = shape.problems_at_once(options);
  for (int64_t first = 0; first < options.problems; first += each) {
    use(first, std::min(each, options.problems - first));
  }
}

template <class T, bool kOnChip>
struct Problem {
  using A = Accumulator<T>;
  static constexpr int kLoadsAtOnce = kOnChip && sizeof(A) == 4 ? 4 : 1;  // of a thread; others would spill

  const TransportOptions& options;
  const TransportShape& shape;
  TransportMemory<A>& memory;
  int64_t number;                // of the problem
  int first_row, rows, columns;  // of this block; all columns
  A epsilon, unit, scale;        // unit: epsilon log 2, scale: its reciprocal
  A lowest = 0;                  // of the costs that count
  A *a, *b;                      // [rows] and [columns], 0 where nothing counts
  A* tile;                       // [tile_rows, columns]

  // Fills a and b. Its cluster's problem is number `first` and more; `room` is device memory for what is not on chip.
  __device__ Problem(const TransportOptions& options_, const TransportShape& shape_, int64_t first,
                     TransportMemory<A>* shared, void* room)
      : options(options_), shape(shape_), memory(*shared), number(first + blockIdx.x / cluster_size()) {
    first_row = int(cluster_rank()) * shape.rows;
    rows = int(options.rows) - first_row;
    rows = rows < 0 ? 0 : rows < shape.rows ? rows : shape.rows;
    columns = int(options.columns);
    epsilon = A(options.epsilon), unit = A(options.epsilon * kLog2), scale = A(kLog2E / options.epsilon);
    free_ = kOnChip ? reinterpret_cast<A*>(shared + 1)
                    : reinterpret_cast<A*>(static_cast<char*>(room) + blockIdx.x * shape.workspace);
    each_ = int64_t(shape.groups) * columns + 1;
    parts_ = take(2 * each_);
    b = take(columns), a = take(shape.rows);
    tile = take(int64_t(shape.tile_rows) * columns);
    if (shape.matrices_on_chip) take(shape.matrices * int64_t(shape.rows) * columns);
    if (threadIdx.x == 0) memory.seen[0] = memory.seen[1] = memory.rows_far = 0;
    write_marginals();
  }

  Problem(const Problem&) = delete;

  // Where the costs are.
  __device__ void read(const CostMatrices& costs) {
    values_ = static_cast<const T*>(costs.values) + number * costs.batch_stride + first_row * costs.row_stride;
    row_stride_ = costs.row_stride, column_stride_ = costs.column_stride;
  }
  __device__ void read(const T* of_this_block) { values_ = of_this_block, row_stride_ = columns, column_stride_ = 1; }

  // The workspace's next `count` numbers: the same place in all blocks.
  __device__ A* take(int64_t count) {
    A* const taken = free_;
    free_ += count;
    return taken;
  }

  // [groups, columns] and one number more: what this block has of a step's sums. Two steps' lie in two places.
  __device__ A* parts_of(int64_t step) const { return parts_ + step % 2 * each_; }

  // The workspace's matrix number `which`, this block's rows.
  __device__ A* matrix(int which, void* room) const {
    if (shape.matrices_on_chip) return tile + (shape.tile_rows + int64_t(which) * shape.rows) * columns;
    const int64_t problems = gridDim.x / cluster_size(), problem = blockIdx.x / cluster_size();
    A* const first = reinterpret_cast<A*>(static_cast<char*>(room) + shape.room_of_workspaces(problems));
    return first + ((problem * shape.matrices + which) * options.rows + first_row) * columns;
  }
  // Block `rank`'s rows of the matrix that this block has `mine` of.
  __device__ const A* matrix_of_peer(const A* mine, unsigned rank) const {
    if (shape.matrices_on_chip) return of_peer(mine, rank);
    return mine + (int64_t(rank) - int64_t(cluster_rank())) * shape.rows * columns;
  }

  __device__ bool keeps_tile() const { return shape.tile_rows >= shape.rows; }
  __device__ bool is_first_block() const { return cluster_rank() == 0; }
  __device__ bool counts(int row, int column) const { return a[row] != 0 && b[column] != 0; }

  // +inf where nothing counts.
  __device__ A cost(int row, int column) const {
    if (!counts(row, column)) return A(INFINITY);
    return widen(values_[row * row_stride_ + column * column_stride_]);
  }

  // The difference first: then an offset of the costs rounds nothing.
  __device__ A below_lowest(int row, int column) const { return lowest - cost(row, column); }

  // Always rounded in this way: backward makes every D to the bit as forward did.
  __device__ A density_of(A below, A F, A G) const { return power_of_two(fused(below, scale, F) + G); }
  __device__ A density(int row, int column, A F, A G) const { return density_of(below_lowest(row, column), F, G); }

  __device__ A column_weight(int column) const {
    if (b[column] == 0) return A(0);
    const A* weights = static_cast<const A*>(options.column_weight);
    return weights ? weights[number * columns + column] : A(1);
  }

  __device__ int64_t at_row(int row) const { return number * options.rows + first_row + row; }
  __device__ int64_t at_column(int column) const { return number * columns + column; }
  // In [B, L, M] and [B, L, N].
  __device__ int64_t at_row(int64_t step, int row) const {
    return (number * options.iterations + step) * options.rows + first_row + row;
  }
  __device__ int64_t at_column(int64_t step, int column) const {
    return (number * options.iterations + step) * columns + column;
  }

  // Calls use(first row, rows) for the rows that are worked on at a time; once where there are none.
  template <class Use>
  __device__ void for_tiles(Use use) const {
    int first = 0;
    do {
      const int left = rows - first;
      use(first, left < shape.tile_rows ? left : shape.tile_rows);
      first += shape.tile_rows;
    } while (first < rows);
  }

  // Calls use(row) with a whole warp for each of the `count` rows from `first` on: always the same warp.
  template <class Use>
  __device__ void for_rows(int first, int count, Use use) const {
    for (int row = threadIdx.x / kWarp; row < count; row += blockDim.x / kWarp) use(first + row);
  }

  // A sum over columns by one warp; every lane gets it.
  template <class Term>
  __device__ A over_columns(Term term) const {
    A sum = 0;
#pragma unroll(kLoadsAtOnce)
    for (int j = threadIdx.x % kWarp; j < columns; j += kWarp) sum += term(j);
    return over_warp(sum, [](A x, A y) { return x + y; });
  }

  // Calls use(column, group): a column has a thread in each group, which takes the rows `group`, `group` + groups, ...
  template <class Use>
  __device__ void for_columns(Use use) const {
    const int width = (columns + kWarp - 1) / kWarp * kWarp;
    for (int at = threadIdx.x; at < shape.groups * width; at += blockDim.x) {
      if (at % width < columns) use(at % width, at / width);
    }
  }

  // Calls use(column) for this thread's share of what all blocks make alike.
  template <class Use>
  __device__ void for_own_columns(Use use) const {
    for (int j = threadIdx.x; j < columns; j += blockDim.x) use(j);
  }

  // This thread's group's part of a column's sum of term(row of the tile), added to that of the tiles before.
  template <class Term>
  __device__ void add_part(A* part, int j, int group, int first, int count, Term term) const {
    A sum = 0;
#pragma unroll(kLoadsAtOnce)
    for (int row = group; row < count; row += shape.groups) sum += term(row);
    A& to = part[group * columns + j];
    to = first == 0 ? sum : to + sum;
  }

  __device__ A* row_of_tile(int row) const { return tile + int64_t(row) * columns; }

  // Block `rank`'s memory that corresponds to this block's `mine`.
  __device__ const A* of_peer(const A* mine, unsigned rank) const {
    if constexpr (kOnChip) return of_block(mine, rank);
    return mine + (int64_t(rank) - int64_t(cluster_rank())) * shape.workspace / int64_t(sizeof(A));
  }

  // Calls use(part) for the parts of a column, of blocks and groups in their order.
  template <class Use>
  __device__ void for_parts(const A* part, int column, Use use) const {
    for (unsigned rank = 0; rank < cluster_size(); ++rank) {
      const A* theirs = of_peer(part, rank) + column;
      for (int group = 0; group < shape.groups; ++group) use(theirs[group * columns]);
    }
  }

  __device__ A sum_of_parts(const A* part, int column) const {
    A sum = 0;
    for_parts(part, column, [&](A x) { sum += x; });
    return sum;
  }

  // Finds the lowest cost. Returns whether every step makes its own D.
  __device__ bool measure() {
    struct Extent {
      A lowest = INFINITY, highest = -INFINITY;
    };
    Extent mine;
    for_rows(0, rows, [&](int row) {
      for (int j = threadIdx.x % kWarp; j < columns; j += kWarp) {
        const A C = cost(row, j);
        mine.lowest = smaller(mine.lowest, C);
        if (C != A(INFINITY)) mine.highest = larger(mine.highest, C);
      }
    });
    const Extent all = over_cluster(
        mine,
        [](const Extent& x, const Extent& y) {
          return Extent{smaller(x.lowest, y.lowest), larger(x.highest, y.highest)};
        },
        reinterpret_cast<Extent*>(memory.join));
    lowest = anything_counts_ ? all.lowest : A(0);
    if (options.domain != Domain::automatic) return options.domain == Domain::log;
    return all.highest - all.lowest > A(kWidestScaling) * epsilon;
  }

 private:
  // How many rows, or columns, have weight.
  struct Counts {
    unsigned rows = 0, columns = 0;
  };

  __device__ static int64_t length(const int64_t* lengths, int64_t number, int64_t size) {
    if (!lengths) return size;
    return lengths[number] < 0 ? 0 : lengths[number] < size ? lengths[number] : size;
  }

  __device__ static A weight(const void* marginal, int64_t at, bool within) {
    if (!within) return A(0);
    return marginal ? static_cast<const A*>(marginal)[at] : A(1);
  }

  // "unit": a = n / m keeps the scalings from drifting by (m / n)^l; the last step gives the same plan.
  __device__ void write_marginals() {
    const int64_t M = options.rows, N = options.columns;
    const int64_t row_end = length(options.row_lengths, number, M), end = length(options.column_lengths, number, N);
    const auto row_weight = [&](int64_t i) { return weight(options.row_marginal, number * M + i, i < row_end); };
    const auto column_weight = [&](int64_t j) { return weight(options.column_marginal, number * N + j, j < end); };
    Counts mine;
    const int64_t thread = int64_t(cluster_rank()) * blockDim.x + threadIdx.x, all = cluster_size() * blockDim.x;
    for (int64_t i = thread; i < M; i += all) mine.rows += row_weight(i) != 0;
    for (int64_t j = thread; j < N; j += all) mine.columns += column_weight(j) != 0;
    const Counts counted = over_cluster(
        mine, [](const Counts& x, const Counts& y) { return Counts{x.rows + y.rows, x.columns + y.columns}; },
        reinterpret_cast<Counts*>(memory.join));
    anything_counts_ = counted.rows > 0 && counted.columns > 0;
    const double m = counted.rows, n = counted.columns;
    A each_row = 1, each_column = 1;
    if (options.marginals == Marginals::uniform) each_row = A(1 / m), each_column = A(1 / n);
    if (options.marginals == Marginals::unit) each_row = A(n / m);
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      a[row] = anything_counts_ ? row_weight(first_row + row) * each_row : A(0);
    }
    for_own_columns([&](int j) { b[j] = anything_counts_ ? column_weight(j) * each_column : A(0); });
    __syncthreads();
  }

  A *free_, *parts_;
  int64_t each_;
  const T* values_;
  int64_t row_stride_, column_stride_;
  bool anything_counts_;
};

}  // namespace mlot::cuda
