// The head of a teacher's probabilities, which weighs the halves of adaptive_kl.
#pragma once

#include "mlot/cuda/divergence_pair.h"

namespace mlot::cuda {

// The bits of a float that is no less than 0 are in its order. Three digits are all of a float's up to 2, seven of a
// double's.
constexpr int kHeadBits = 10;
constexpr unsigned kHeadBins = 1u << kHeadBits;

__device__ inline uint32_t ordered_bits(float p) { return __float_as_uint(p); }
__device__ inline uint64_t ordered_bits(double p) {
  uint64_t bits;
  memcpy(&bits, &p, sizeof(bits));
  return bits;
}
template <class B>
using OrderedBits = decltype(ordered_bits(B()));
template <class B>
constexpr int kFirstHeadShift = sizeof(B) == 8 ? 60 : 20;

// Mass is a whole number of units, so that no sum of it depends on the order in which it is made.
struct HeadMemory {
  unsigned low[kHeadBins], high[kHeadBins];  // of the block: the mass of each digit, in two halves
  uint64_t all[kHeadBins];                   // of the cluster
  uint64_t above;                            // the mass of what is larger than all that has the digits so far
  double whole;
  unsigned digit;
};

// The largest digit of which the mass of all that are no smaller is above `head` of the whole; 0 where that of none is.
// One warp.
__device__ inline void find_digit_of_head(HeadMemory& memory, double head, bool is_first) {
  constexpr unsigned kEach = kHeadBins / kWarp;
  const unsigned lane = threadIdx.x % kWarp, first = kHeadBins - 1 - lane * kEach;
  uint64_t mine = 0;
  for (unsigned i = 0; i < kEach; ++i) mine += memory.all[first - i];
  uint64_t above = mine;
  for (unsigned lanes = 1; lanes < kWarp; lanes *= 2) {
    const uint64_t more = from_lane(above, int(lane >= lanes ? lane - lanes : lane));
    if (lane >= lanes) above += more;
  }
  const uint64_t of_all = from_lane(above, kWarp - 1);
  const double least = head * (is_first ? double(of_all) : memory.whole);
  above += (is_first ? 0 : memory.above) - mine;
  __syncwarp();
  if (lane == 0) {
    memory.digit = 0;
    if (is_first) memory.whole = double(of_all), memory.above = 0;
  }
  __syncwarp();
  if (double(above) > least || !(double(above + mine) > least)) return;
  unsigned digit = first;
  while (!(double(above + memory.all[digit]) > least)) above += memory.all[digit--];
  memory.digit = digit, memory.above = above;
}

// The bits of the smallest probability in the head: from histograms of mass by one digit after the other, in a reading
// of the row for each.
template <bool kPairs, class B>
__device__ inline OrderedBits<B> least_of_head(const DivergenceProblem& problem, const PairScalars<B>& pair,
                                               int64_t slot, double units, HeadMemory& memory) {
  using Bits = OrderedBits<B>;
  Bits least = 0;
#pragma unroll 1
  for (int shift = kFirstHeadShift<B>; shift >= 0; shift -= kHeadBits) {
    const bool is_first = shift == kFirstHeadShift<B>;
    for (unsigned bin = threadIdx.x; bin < kHeadBins; bin += blockDim.x) memory.low[bin] = memory.high[bin] = 0;
    __syncthreads();
    for_tiles<kPairs, B>(problem, slot, [&](const ColumnTile<B>& tile) {
#pragma unroll
      for (int i = 0; i < kColumnsAtOnce<B>; ++i) {
        const B p = pair.teacher.softmax(tile.y[i]);  // as it meets: nothing is mixed here
        const Bits bits = ordered_bits(p);
        const bool has_digits = is_first || bits >> (shift + kHeadBits) == least >> (shift + kHeadBits);
        if (!(p > B(0)) || tile.leaves_out(i) || !has_digits) continue;
        const auto mass = uint64_t(p * B(units));
        const unsigned bin = unsigned(bits >> shift) & (kHeadBins - 1), low = unsigned(mass);
        const unsigned carry = atomicAdd(memory.low + bin, low) + low < low;
        const unsigned high = unsigned(mass >> 32) + carry;
        if (high) atomicAdd(memory.high + bin, high);
      }
    });
    cluster_sync();
    for (unsigned bin = threadIdx.x; bin < kHeadBins; bin += blockDim.x) {
      uint64_t all = 0;
      for (unsigned rank = 0; rank < cluster_size(); ++rank) {
        all += *of_block(memory.low + bin, rank) + (uint64_t(*of_block(memory.high + bin, rank)) << 32);
      }
      memory.all[bin] = all;
    }
    cluster_sync();  // nobody counts anew before all have read
    if (threadIdx.x < kWarp) find_digit_of_head(memory, problem.options.head, is_first);
    __syncthreads();
    least |= Bits(memory.digit) << shift;
  }
  return least;
}

struct Differences {
  double whole = 0, of_head = 0;
};

// The part of |p - q| that lies in the head: the fewest of the largest p whose sum is above `head` of all, equal ones
// together. 1/2 where p = q throughout. Every thread of the cluster gets the same. `joins` has room for
// kJoin<Differences>. `units`: of a probability of 1.
template <bool kPairs, class B>
__device__ inline double share_of_forward(const DivergenceProblem& problem, const PairScalars<B>& pair, int64_t slot,
                                          double units, HeadMemory& memory, void* joins) {
  const auto least = least_of_head<kPairs>(problem, pair, slot, units, memory);
  B whole = 0, of_head = 0;
  for_tiles<kPairs, B>(problem, slot, [&](const ColumnTile<B>& tile) {
#pragma unroll
    for (int i = 0; i < kColumnsAtOnce<B>; ++i) {
      const auto m = meet<false>(pair, tile.x[i], tile.y[i], tile.leaves_out(i));
      const B difference = m.p < m.q ? m.q - m.p : m.p - m.q;
      whole += difference;
      if (ordered_bits(m.softmax[1]) >= least) of_head += difference;
    }
  });
  const auto add = [](const Differences& a, const Differences& b) {
    return Differences{a.whole + b.whole, a.of_head + b.of_head};
  };
  const auto all = over_cluster(Differences{double(whole), double(of_head)}, add, static_cast<Differences*>(joins));
  return all.whole > 0 ? all.of_head / all.whole : all.whole == 0 ? 0.5 : double(NAN);
}

}  // namespace mlot::cuda
