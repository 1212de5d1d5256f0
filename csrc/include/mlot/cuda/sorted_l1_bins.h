// Bins of log2 p that the two rows of a pair share: how many logits of either row are in each, and which bins these
// counts give a sign; see mlot_kernels/ops/sorted_l1/README.md.
//
// A logit's bin is made of its log2 p, as the rows compare it, by steps that each keep the order: of two probabilities
// the larger one is never in a later bin, and equal ones are in the same.
#pragma once

#include "mlot/cuda/sorted_l1_signs.h"

namespace mlot::cuda {

constexpr unsigned kMostOpen = (1 << 14) - 16;  // logits of a row in open bins: fewer than 14 bits count
constexpr unsigned kFewestParts = 8;            // of an open bin, below which another read of both rows is not worth it
constexpr int64_t kBinSample = 1024;            // logits of a row that set the range

// What a bin's logits of one side have: the sign of p - the other's p, or one that is found for each of them.
enum BinState : unsigned { kOpen, kPlus, kMinus, kInTail };

// Over the closed bins of a row: of sign p and sign p (x - peak), and for ranks from top_k on of p and p (x - peak).
struct ClosedSums {
  SignedSums head, tail;

  __device__ static ClosedSums join(const ClosedSums& a, const ClosedSums& b) {
    return {SignedSums::join(a.head, b.head), SignedSums::join(a.tail, b.tail)};
  }
};

struct BinSizes {
  unsigned bins, open;  // room for so many logits of either row in open bins, a multiple of 16
};

// Where a cluster counts the rows of a pair: in the shared memory of each block. Every block counts for itself, then
// all of them have the same ranks and slots; what is listed lies in one block each.
struct BinMemory {
  unsigned* ranks[2];  // [bins + 1]: of the first logit of each; before that how many there are
  uint16_t* slots[2];  // [bins]: the state of each, and how many logits in open ones come before
  uint16_t* map;       // [bins]
  unsigned* found;     // [2], the first block's: logits in the lists
  ClosedSums* sums;    // [2]
  SortMemory* sort;
  unsigned char* area;  // counters [2, bins] of the second level, then lists
  BinSizes sizes;

  static constexpr unsigned kMargin = 4;  // a multiple of 16 bytes behind the ranks

  // Arrays of lists are dealt to the blocks: both rows' and room to sort them.
  __host__ __device__ static constexpr unsigned lists_of_block(unsigned blocks) { return (3 + blocks - 1) / blocks; }
  __host__ __device__ static constexpr unsigned bytes_of_tables(unsigned bins) {
    return 2 * (bins + kMargin) * unsigned(sizeof(unsigned)) + 3 * bins * unsigned(sizeof(uint16_t)) + 16 +
           2 * unsigned(sizeof(ClosedSums));
  }
  __host__ __device__ static constexpr unsigned bytes_of_area(BinSizes sizes, unsigned blocks, unsigned logit) {
    const unsigned counters = 2 * sizes.bins * unsigned(sizeof(unsigned));
    const unsigned lists = lists_of_block(blocks) * sizes.open * logit;
    return counters > lists ? counters : lists;
  }

  __device__ BinMemory(unsigned char* at, BinSizes given) : sizes(given) {
    ranks[0] = reinterpret_cast<unsigned*>(at), ranks[1] = ranks[0] + sizes.bins + kMargin;
    slots[0] = reinterpret_cast<uint16_t*>(ranks[1] + sizes.bins + kMargin), slots[1] = slots[0] + sizes.bins;
    map = slots[1] + sizes.bins;
    at = reinterpret_cast<unsigned char*>(map + sizes.bins);
    found = reinterpret_cast<unsigned*>(at), at += 16;
    sums = reinterpret_cast<ClosedSums*>(at), at += 2 * sizeof(ClosedSums);
    sort = reinterpret_cast<SortMemory*>(at), at += sort_bytes(blockDim.x);
    area = at;
  }

  __device__ unsigned* counters(int side) const { return reinterpret_cast<unsigned*>(area) + side * sizes.bins; }

  // Number 0 and 1 are the rows', number 2 is room for either; `logit` bytes are the larger one of the two rows'.
  template <class Key>
  __device__ Key* list(unsigned number, unsigned logit) const {
    const unsigned blocks = cluster_size();
    return reinterpret_cast<Key*>(of_block(area + number / blocks * sizes.open * logit, number % blocks));
  }

  // All that a block counts in or looks at first.
  __device__ void clear() const {
    for (unsigned i = threadIdx.x; i <= sizes.bins; i += blockDim.x) ranks[0][i] = ranks[1][i] = 0;
    for (unsigned i = threadIdx.x; i < sizes.bins; i += blockDim.x) slots[0][i] = slots[1][i] = 0;
    if (threadIdx.x < 2) found[threadIdx.x] = 0, sums[threadIdx.x] = {};
    __syncthreads();
  }

  // This thread's share of the bins, neighbours.
  template <class Use>
  __device__ void for_bins(Use use) const {
    const unsigned threads = cluster_size() * blockDim.x, each = (sizes.bins + threads - 1) / threads;
    const unsigned begin = (cluster_rank() * blockDim.x + threadIdx.x) * each;
    for (unsigned bin = begin; bin < begin + each && bin < sizes.bins; ++bin) use(bin);
  }

  template <class E>
  __device__ void write_to_all(E* mine, unsigned value) const {
    for (unsigned rank = 0; rank < cluster_size(); ++rank) *of_block(mine, rank) = E(value);
  }
};

// The slot of a logit, from its log2 p: its bin; or, on the second level, its part of an open bin of the first, or the
// slot that neighbouring closed bins of equal states share.
template <class A>
struct SlotIndex {
  static constexpr unsigned kOpenBin = 1 << 15;  // beside a bin's first slot

  A top, per_bit;
  unsigned bins, parts;  // of an open bin; 0: there is no second level
  const uint16_t* map;

  // A NaN is in the last bin.
  __device__ A place(A log2_p) const {
    const A last = A(bins - 1), at = (top - log2_p) * per_bit;
    return at < last ? larger(at, A(0)) : last;
  }
  __device__ unsigned of(A log2_p) const {
    const A at = place(log2_p);
    const unsigned bin = unsigned(at);
    if (parts == 0) return bin;
    const unsigned entry = map[bin], first = entry & (kOpenBin - 1);
    if (!(entry & kOpenBin)) return first;
    const unsigned part = unsigned((at - A(bin)) * A(parts));
    return first + (part < parts ? part : parts - 1);
  }
  __device__ bool is_part(A log2_p) const { return map[unsigned(place(log2_p))] & kOpenBin; }
};

// Calls use(x) for this thread's share of a row's logits that are looked at, without -inf.
template <class T, class Use>
__device__ inline void for_looked_at(const T* row, const LogitsRows& rows, Use use) {
  for_vectors<2>(row, rows.vocab_size, [&](int64_t first, int64_t step, const Accumulator<T>(&x)[2][kLanes<T>]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t column = first + i * step + lane;  // -inf behind the row
        if (!(x[i][lane] > Accumulator<T>(-INFINITY)) || (rows.column_mask && !rows.column_mask[column])) continue;
        use(x[i][lane]);
      }
    }
  });
}

template <class A>
struct Extent {
  A low = A(INFINITY), high = A(-INFINITY);

  __device__ static Extent join(const Extent& a, const Extent& b) {
    return {a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high};
  }
};

// Adds some of a row's log2 p, of the same columns whatever there are of threads.
template <class T, class A = Accumulator<T>>
__device__ inline void sample(const T* row, const LogitsRows& rows, const Likelihood<A>& law, Extent<A>& extent) {
  const int64_t stride = (rows.vocab_size + kBinSample - 1) / kBinSample;
  const int64_t thread = cluster_rank() * blockDim.x + threadIdx.x, threads = cluster_size() * blockDim.x;
  for (int64_t column = thread * stride; column < rows.vocab_size; column += threads * stride) {
    if (rows.column_mask && !rows.column_mask[column]) continue;
    const A t = law.log2_p(widen(row[column]));
    if (t - t == 0) extent = Extent<A>::join(extent, {t, t});  // neither infinity nor NaN
  }
}

// Bins over what a sample covers and a quarter more on both sides; all else is in the first bin and the last.
template <class A>
__device__ inline SlotIndex<A> index_of(const Extent<A>& extent, const BinMemory& memory) {
  const bool none = !(extent.low <= extent.high);
  const A high = none ? A(0) : extent.high, range = none ? A(0) : extent.high - extent.low;
  const A margin = range > 0 ? range / 4 : A(1);
  const unsigned bins = memory.sizes.bins;
  return {high + margin, A(bins - 2) / (range + 2 * margin), bins, 0, memory.map};
}

struct PairCount {
  unsigned of[2] = {0, 0};

  __device__ static PairCount join(const PairCount& a, const PairCount& b) {
    return {{a.of[0] + b.of[0], a.of[1] + b.of[1]}};
  }
};

// Of the counters of all blocks makes ranks, in every block; the same memory may hold both. The cluster has counted.
__device__ inline void ranks_of_counters(unsigned* counters, unsigned* other_counters, const BinMemory& memory,
                                         void* joins) {
  unsigned* const tables[2] = {counters, other_counters};
  PairCount mine;
  memory.for_bins([&](unsigned bin) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      unsigned all = 0;
      for (unsigned rank = 0; rank < cluster_size(); ++rank) all += *of_block(tables[side] + bin, rank);
      tables[side][bin] = all;  // nobody else looks at a bin's counters
      mine.of[side] += all;
    }
  });
  const auto scanned = scan_over_cluster(mine, PairCount::join, static_cast<PairCount*>(joins));
  PairCount running = scanned.before;
  memory.for_bins([&](unsigned bin) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const unsigned own = tables[side][bin];
      memory.write_to_all(memory.ranks[side] + bin, running.of[side]);
      running.of[side] += own;
    }
  });
  if (threadIdx.x == 0) {
    memory.ranks[0][memory.sizes.bins] = scanned.all.of[0];
    memory.ranks[1][memory.sizes.bins] = scanned.all.of[1];
  }
  cluster_sync();
}

// The states of a slot on both sides: the student's, and four times the teacher's.
constexpr unsigned kBothOpen = 0, kNothing = 16;

// Of a slot whose ranks on the sides are [p, p_end) and [q, q_end). All of one side's are larger than what they meet
// where as many of the other side are before them as are so in it and before it.
__device__ inline unsigned states_of(unsigned p, unsigned p_end, unsigned q, unsigned q_end, unsigned top_k) {
  if (p == p_end && q == q_end) return kNothing;
  if ((p < top_k && top_k < p_end) || (q < top_k && top_k < q_end)) return kBothOpen;
  const bool p_in_tail = p >= top_k, q_in_tail = q >= top_k, plus = p >= q_end;
  if (!plus && q < p_end && !(p_in_tail && q_in_tail)) return kBothOpen;
  return (p_in_tail ? kInTail : plus ? kPlus : kMinus) + 4 * (q_in_tail ? kInTail : plus ? kMinus : kPlus);
}

// Along neighbouring slots: the logits in open ones, how many are open, and how many groups of equal states the closed
// ones are.
struct Opened {
  PairCount logits;
  unsigned open = 0, groups = 0;
  unsigned first = kNothing, last = kNothing;  // states of the first slot that is not empty, and of the last one

  // `b` follows.
  __device__ static Opened join(const Opened& a, const Opened& b) {
    if (a.first == kNothing) return b;
    if (b.first == kNothing) return a;
    const unsigned same = a.last == b.first && b.first != kBothOpen;
    return {PairCount::join(a.logits, b.logits), a.open + b.open, a.groups + b.groups - same, a.first, b.last};
  }
};

// Where open slots have more logits than there is room for: into how many parts the second level divides each; 0: too
// few. `fits`: there is room.
struct Opening {
  bool fits;
  unsigned parts;
  PairCount logits;
};

// Finds the states of all slots. Where what is open fits, `slots` gets them, in every block. Else, on the first level,
// where there are enough parts: `map` gets each bin's first slot on the second one, whose counters, cleared, get the
// logits in closed bins, and `slots` the states of their groups, which counts alone would not find again.
__device__ inline Opening open_slots(const BinMemory& memory, unsigned top_k, bool is_first_level, void* joins) {
  const BinSizes sizes = memory.sizes;
  const auto look = [&](unsigned slot) {
    const unsigned p = memory.ranks[0][slot], p_end = memory.ranks[0][slot + 1];
    const unsigned q = memory.ranks[1][slot], q_end = memory.ranks[1][slot + 1];
    const unsigned known = is_first_level ? kBothOpen : memory.slots[0][slot] + 4u * memory.slots[1][slot];
    const unsigned states = known != kBothOpen ? known : states_of(p, p_end, q, q_end, top_k);
    Opened one;
    one.first = one.last = states;
    one.open = states == kBothOpen;
    one.groups = states != kBothOpen && states != kNothing;
    if (one.open) one.logits = {{p_end - p, q_end - q}};
    return one;
  };
  Opened mine;
  memory.for_bins([&](unsigned slot) { mine = Opened::join(mine, look(slot)); });
  const auto scanned = scan_over_cluster(mine, Opened::join, static_cast<Opened*>(joins));
  const Opened& all = scanned.all;
  const bool fits = all.logits.of[0] <= sizes.open && all.logits.of[1] <= sizes.open;
  unsigned parts = fits || !is_first_level ? 0 : (sizes.bins - all.groups) / all.open;
  if (parts < kFewestParts) parts = 0;
  const Opening made{fits, parts, all.logits};
  if (!fits && parts == 0) return made;

  if (!fits) {
    for (unsigned i = threadIdx.x; i < 2 * sizes.bins; i += blockDim.x) memory.counters(0)[i] = 0;
    __syncthreads();
  }
  Opened running = scanned.before;
  memory.for_bins([&](unsigned slot) {
    const Opened one = look(slot), behind = Opened::join(running, one);
    const bool is_closed = one.groups > 0;
    if (fits) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const unsigned state = is_closed ? one.first >> (2 * side) & 3 : unsigned(kOpen);
        memory.write_to_all(memory.slots[side] + slot, running.logits.of[side] * 4 + state);
      }
    } else {
      unsigned first = running.groups + running.open * parts;  // slots before
      if (is_closed ? behind.groups == running.groups : one.open == 0 && first > 0) --first;
      memory.write_to_all(memory.map + slot, first + (one.open ? SlotIndex<float>::kOpenBin : 0));
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (!is_closed) continue;
        const unsigned count = memory.ranks[side][slot + 1] - memory.ranks[side][slot];
        if (count > 0) atomicAdd(memory.counters(side) + first, count);
        if (behind.groups > running.groups) {
          memory.write_to_all(memory.slots[side] + first, one.first >> (2 * side) & 3);
        }
      }
    }
    running = behind;
  });
  cluster_sync();
  return made;
}

}  // namespace mlot::cuda
