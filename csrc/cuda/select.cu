#include "mlot/cuda/select.h"

#include "mlot/cuda/launch.h"
#include "mlot/cuda/rows.h"

namespace mlot::cuda {
namespace {

constexpr unsigned kBins = 256;  // of a digit of eight bits

// An integer that is larger for what comes earlier.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);  // the sum of -0 and 0 is 0
  return x != x ? ~uint32_t(0) : bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}
__device__ inline uint64_t key_of(double x) {
  uint64_t bits;
  x += 0.;
  memcpy(&bits, &x, sizeof(bits));
  return x != x ? ~uint64_t(0) : bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// A key above what is larger for a lower column: different for every column.
template <class A>
struct OrderOf {
  using type = uint64_t;
};
template <>
struct OrderOf<double> {
  using type = unsigned __int128;
};
template <class A>
using Order = typename OrderOf<A>::type;

// The bits of a key that are the same in all that are of T; they are left 0.
template <class T>
constexpr int kEmptyBits = 0;
template <>
constexpr int kEmptyBits<bfloat16> = 16;
template <>
constexpr int kEmptyBits<float16> = 8;

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
  unsigned histogram[2][kBins];  // of the block; of one digit, of the next one
  unsigned all[kBins];           // of the cluster
  unsigned digit, above, inside;
  unsigned found;  // by the cluster; of the first block
};

// The largest digit of which all that are no smaller number at least `wanted`; how many are larger, how many have it.
__device__ inline void find_digit(SelectMemory& memory, unsigned wanted) {
  constexpr unsigned kEach = kBins / kWarp;
  const unsigned lane = threadIdx.x % kWarp, first = kBins - 1 - lane * kEach;
  unsigned mine = 0;
  for (unsigned i = 0; i < kEach; ++i) mine += memory.all[first - i];
  unsigned above = mine;
  for (unsigned lanes = 1; lanes < kWarp; lanes *= 2) {
    const unsigned more = __shfl_up_sync(~0u, above, lanes);
    if (lane >= lanes) above += more;
  }
  above -= mine;
  if (above >= wanted || above + mine < wanted) return;
  unsigned digit = first;
  while (above + memory.all[digit] < wanted) above += memory.all[digit--];
  memory.digit = digit, memory.above = above, memory.inside = memory.all[digit];
}

// Owns a row with a cluster. The k-th largest is found digit by digit, from histograms of eight bits, of the values
// and, where these are equal, of the columns: exact, whatever the row, in a reading for each digit, until nothing that
// has the digits so far is left over. The k that reach it are collected in any order, and counting the larger ones
// among them gives each its place. Counts alone are added up by atomics: no bit depends on their order.
template <class T, class Rows, class A = Accumulator<T>>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3) select(Rows rows, Selection to) {
  using C = Order<A>;
  constexpr int kColumnBits = 32, kTop = 8 * int(sizeof(A)) + kColumnBits - 8;
  MLOT_SHARED_MEMORY(SelectMemory, shared);
  SelectMemory& memory = *shared;
  const int64_t number = blockIdx.x / cluster_size();
  const T* row = rows.template row<T>(number);
  C* const found = static_cast<C*>(to.found) + number * to.k;
  const auto order = [&](A x, int64_t column) {
    C key = key_of(x) >> kEmptyBits<T> << kEmptyBits<T>;
    if (to.column_mask && !to.column_mask[column]) key = 0;
    return C(key << kColumnBits | C(uint32_t(to.end - 1 - column)));
  };
  const auto for_columns = [&](auto use) {
    if (!row) {
      const int64_t stride = int64_t(cluster_size()) * blockDim.x;
      for (int64_t column = int64_t(cluster_rank()) * blockDim.x + threadIdx.x; column < to.end; column += stride) {
        use(order(A(0), column));
      }
      return;
    }
    for_vectors<2>(row, to.end, [&](int64_t first, int64_t step, const A(&x)[2][kLanes<T>]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          const int64_t column = first + i * step + lane;
          if (column < to.end) use(order(x[i][lane], column));
        }
      }
    });
  };

  if (threadIdx.x == 0) memory.found = 0;
  C least = 0;  // the digits so far of the k-th largest
  unsigned wanted = unsigned(to.k);
  int shift = kTop;
  for (int turn = 0;; ++turn) {
    unsigned* const histogram = memory.histogram[turn % 2];  // which nobody reads since the turn before
    for (unsigned bin = threadIdx.x; bin < kBins; bin += blockDim.x) histogram[bin] = 0;
    __syncthreads();
    for_columns([&](C c) {
      if (shift == kTop || c >> (shift + 8) == least >> (shift + 8)) {
        atomicAdd(histogram + (unsigned(c >> shift) & (kBins - 1)), 1u);
      }
    });
    cluster_sync();
    for (unsigned bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      unsigned all = 0;
      for (unsigned rank = 0; rank < cluster_size(); ++rank) all += *of_block(histogram + bin, rank);
      memory.all[bin] = all;
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_digit(memory, wanted);
    __syncthreads();
    least |= C(memory.digit) << shift;
    wanted -= memory.above;
    if (memory.inside == wanted) break;  // as it is once all digits are known
    do {
      shift -= 8;
    } while ((shift >= kColumnBits && shift < kColumnBits + kEmptyBits<T>) ||
             (shift > 0 && shift < kColumnBits && (to.end - 1) >> shift == 0));
  }
  for_columns([&](C c) {
    if (c >> shift >= least >> shift) found[atomicAdd(of_block(&memory.found, 0), 1u)] = c;
  });
  cluster_sync();
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int64_t i = cluster_rank() * warps + threadIdx.x / kWarp; i < to.k; i += cluster_size() * warps) {
    const C mine = found[i];
    unsigned place = 0;
    for (int64_t j = lane; j < to.k; j += kWarp) place += found[j] > mine;
    place = __reduce_add_sync(~0u, place);
    const int64_t column = to.end - 1 - int64_t(uint32_t(mine));
    for (int64_t copy = lane; copy < to.copies; copy += kWarp) {
      to.columns[(number * to.copies + copy) * to.k + place] = column;
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

}  // namespace

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
