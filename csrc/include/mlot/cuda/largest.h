// The k largest of a row's columns, found by a cluster: what columns are ordered by, and the digits of the k-th
// largest.
#pragma once

#include "mlot/cuda/rows.h"

namespace mlot::cuda {

constexpr unsigned kBins = 256;  // of a digit
constexpr int kDigitBits = 8;

// An integer that is larger for what comes earlier: NaN first, -0 equal to 0. Never 0.
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
template <class A>
using Key = decltype(key_of(A()));

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

constexpr int kColumnBits = 32;

// The bits of a key that are the same in all that are of T; they are left 0.
template <class T>
constexpr int kEmptyBits = 0;
template <>
constexpr int kEmptyBits<bfloat16> = 16;
template <>
constexpr int kEmptyBits<float16> = 8;

// How a row's columns below `end` are ordered: those that the mask leaves out come last.
template <class T>
struct ColumnOrder {
  using A = Accumulator<T>;

  const bool* mask;  // [V] or null
  int64_t end;

  __device__ Key<A> key(A x, int64_t column) const {
    return mask && !mask[column] ? 0 : key_of(x) >> kEmptyBits<T> << kEmptyBits<T>;
  }
  __device__ Order<A> order(A x, int64_t column) const {
    return Order<A>(key(x, column)) << kColumnBits | Order<A>(uint32_t(end - 1 - column));
  }
  __device__ int64_t column(Order<A> order) const { return end - 1 - int64_t(uint32_t(order)); }

  static constexpr int kTop = 8 * int(sizeof(A)) + kColumnBits - kDigitBits;  // the shift of the first digit

  // The shift of the digit after that: digits that are the same in all columns are left out.
  __device__ int next(int shift) const {
    do {
      shift -= kDigitBits;
    } while ((shift >= kColumnBits && shift < kColumnBits + kEmptyBits<T>) ||
             (shift > 0 && shift < kColumnBits && (end - 1) >> shift == 0));
    return shift;
  }
};

struct DigitMemory {
  unsigned histogram[2][kBins];  // of the block; of one digit, of the next one
  unsigned all[kBins];           // of the cluster
  unsigned digit, above, inside;
};

// The largest digit of which all that are no smaller number at least `wanted`; how many are larger, how many have it.
// One warp.
__device__ inline void find_digit(DigitMemory& memory, unsigned wanted) {
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

// Of integers C: at least so many as were wanted have c >> shift >= least >> shift.
template <class C>
struct Cut {
  C least;
  int shift;

  __device__ bool reached_by(C c) const { return c >> shift >= least >> shift; }
};

// The digits of the `wanted`-th largest of all integers that the cluster's threads pass to `use` in for_each(use), from
// histograms of eight bits each, of which none depends on the order of atomics. A turn for each digit, from that at
// `shift` on, then next(shift), until nothing that has the digits so far is left over or, where next(shift) is
// negative, digits end: then more than wanted may reach the cut. Whoever uses the memory again first waits for the
// cluster.
template <class C, class Next, class ForEach>
__device__ inline Cut<C> cut_at(DigitMemory& memory, unsigned wanted, int shift, Next next, ForEach for_each) {
  const int top = shift;
  C least = 0;
  for (int turn = 0;; ++turn) {
    unsigned* const histogram = memory.histogram[turn % 2];  // which nobody reads since the turn before
    for (unsigned bin = threadIdx.x; bin < kBins; bin += blockDim.x) histogram[bin] = 0;
    __syncthreads();
    for_each([&](C c) {
      if (shift == top || c >> (shift + kDigitBits) == least >> (shift + kDigitBits)) {
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
    const int following = next(shift);
    if (following < 0) break;
    shift = following;
  }
  return {least, shift};
}

// A cluster finds the k largest columns of its row, in any order, into `found` [k]: exact, whatever the row. Reads it
// once for each digit: for_columns(use) calls use(x, column) for this thread's share of it. `count` is shared memory.
template <class T, class ForColumns>
__device__ inline void collect_largest(DigitMemory& memory, unsigned* count, const ColumnOrder<T>& columns, int64_t k,
                                       Order<Accumulator<T>>* found, ForColumns for_columns) {
  using A = Accumulator<T>;
  if (threadIdx.x == 0) *count = 0;
  const auto cut = cut_at<Order<A>>(
      memory, unsigned(k), columns.kTop, [&](int shift) { return columns.next(shift); },
      [&](auto use) { for_columns([&](A x, int64_t column) { use(columns.order(x, column)); }); });
  for_columns([&](A x, int64_t column) {
    const auto c = columns.order(x, column);
    if (cut.reached_by(c)) found[atomicAdd(of_block(count, 0), 1u)] = c;
  });
  cluster_sync();
}

// A warp tells the place of `mine` among `size` different ones.
template <class C>
__device__ inline unsigned place_among(const C* all, int64_t size, C mine) {
  unsigned place = 0;
  for (int64_t i = threadIdx.x % kWarp; i < size; i += kWarp) place += all[i] > mine;
  return __reduce_add_sync(~0u, place);
}

}  // namespace mlot::cuda
