// A pair of rows in bins: sums over closed ones, lists of the logits in open ones, and the walk down either row.
#pragma once

#include <climits>

#include "mlot/cuda/sorted_l1_bins.h"

namespace mlot::cuda {

// A run of an open slot, or all ranks of a closed one, which has no x.
template <class A>
struct SlotRun {
  A x;
  int first, last;
  unsigned slot, state;
};

// A row in slots. It is in order: of open slots, all logits are listed; of closed ones, how many there are. The pair's
// other row has the same accumulator.
template <class T>
struct BinnedRow {
  using A = Accumulator<T>;
  using Element = T;
  const DescendingKey<T>* keys;  // `listed`
  unsigned listed;
  Likelihood<A> law;
  SlotIndex<A> index;
  const unsigned* ranks;
  const uint16_t* slots;
  const ClosedSums* sums;

  __device__ unsigned state(unsigned slot) const { return slots[slot] & 3u; }
  __device__ unsigned listed_before(unsigned slot) const { return slot < index.bins ? slots[slot] / 4u : listed; }
  __device__ SortedRow<T> logits_of(unsigned slot) const {  // of an open one
    return {keys + listed_before(slot), int(ranks[slot + 1] - ranks[slot]), law};
  }

  // The smallest number whose slot is before this one.
  __device__ A lower_end_before(unsigned slot) const {
    DescendingKey<T> low = descending_key<T>(A(INFINITY)), high = descending_key<T>(A(-INFINITY));
    while (high - low > 1) {
      const auto middle = DescendingKey<T>(low + (high - low) / 2);
      if (index.of(law.log2_p(logit_of<T>(middle))) < slot) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return logit_of<T>(low);
  }
};

template <class T, class A>
__device__ inline double probability(const BinnedRow<T>& row, const SlotRun<A>& run) {
  return run.state == kOpen ? double(row.law.p(run.x)) : 0;
}
template <class T>
__device__ inline double tail_in_sums(const BinnedRow<T>& row) {
  return row.sums->tail.total;
}
template <class T>
__device__ inline void add_sums(const BinnedRow<T>& row, int tail_sign, SignedSums& sums) {
  sums.total += row.sums->head.total + tail_sign * row.sums->tail.total;
  sums.moment += row.sums->head.moment + tail_sign * row.sums->tail.moment;
}

// The next larger number than a run's, or than any of a slot's.
template <class T, class A>
__device__ inline A threshold(const BinnedRow<T>& row, const SlotRun<A>& run, A) {
  return run.state == kOpen ? logit_of<T>(DescendingKey<T>(descending_key<T>(run.x) - 1))
                            : row.lower_end_before(run.slot);
}

// As for other rows. A slot takes a place of its own and one for each of its listed logits, which are dealt evenly: it
// may be that nearly all are in one slot.
template <class T, class Use>
__device__ inline void for_runs(const BinnedRow<T>& row, Use use) {
  const unsigned bins = row.index.bins, all = bins + row.listed, threads = cluster_size() * blockDim.x;
  const unsigned each = (all + threads - 1) / threads, begin = (cluster_rank() * blockDim.x + threadIdx.x) * each;
  const unsigned end = begin + each < all ? begin + each : all;
  if (begin >= end) return;
  unsigned slot = 0, behind = bins;  // the last one that does not begin behind `begin`
  while (behind - slot > 1) {
    const unsigned middle = (slot + behind) / 2;
    if (middle + row.listed_before(middle) <= begin) {
      slot = middle;
    } else {
      behind = middle;
    }
  }
  for (; slot < bins; ++slot) {
    const unsigned place = slot + row.listed_before(slot);
    if (place >= end) break;
    const int first = int(row.ranks[slot]), last = int(row.ranks[slot + 1]);
    if (first == last) continue;
    if (row.state(slot) != kOpen) {
      if (place >= begin) use(SlotRun<Accumulator<T>>{0, first, last, slot, row.state(slot)});
      continue;
    }
    const SortedRow<T> logits = row.logits_of(slot);
    const int from = begin > place ? int(begin - place) - 1 : 0, left = int(end - place) - 1;
    const int until = left < logits.listed ? left : logits.listed;
    for (int i = logits.first_run_from(from), next; i < until; i = next) {
      const auto run = logits.run(i, next);
      use(SlotRun<Accumulator<T>>{run.x, first + run.first, first + run.last, slot, kOpen});
    }
  }
}

// As for other rows. The ranks of a closed slot meet what gives them their sign, those of an open one the other row's
// logits in the same slot.
template <class S, class T, class Use>
__device__ inline void for_runs_met(const BinnedRow<S>& own, const BinnedRow<T>& other, Use use) {
  Met in_slot;
  unsigned slot = ~0u;
  for_runs(own, [&](const auto& run) {
    if (run.state != kOpen) return use(run, run.state == kMinus ? Met{INT_MAX, INT_MAX} : Met{});
    if (run.slot != slot) slot = run.slot, in_slot = {};
    in_slot = other.logits_of(slot).meet(own.law.log2_p(run.x), in_slot);
    const int before = int(other.ranks[slot]);
    use(run, Met{before + in_slot.larger, before + in_slot.no_smaller});
  });
}

// Counts a row's logits by their slots: on the second level those in open bins of the first.
template <class T>
__device__ inline void count_slots(const T* row, const LogitsRows& rows, const Likelihood<Accumulator<T>>& law,
                                   const SlotIndex<Accumulator<T>>& index, unsigned* counters) {
  for_looked_at(row, rows, [&](Accumulator<T> x) {
    const Accumulator<T> t = law.log2_p(x);
    if (index.parts == 0 || index.is_part(t)) atomicAdd(counters + index.of(t), 1u);
  });
}

// Reads a row for the sums over its closed slots and the list of what is in its open ones. The order of the list is
// that of atomics until it is sorted; equal keys are not told apart.
template <class T>
__device__ inline void read_slots(const T* row, const LogitsRows& rows, const BinnedRow<T>& made,
                                  DescendingKey<T>* keys, unsigned* found, ClosedSums* all, void* joins) {
  using A = Accumulator<T>;
  ClosedSums mine;
  for_looked_at(row, rows, [&](A x) {
    const unsigned state = made.state(made.index.of(made.law.log2_p(x)));
    if (state == kOpen) {
      keys[atomicAdd(found, 1u)] = descending_key<T>(x);
      return;
    }
    const double p = double(made.law.p(x)), h = state == kMinus ? -p : p, moment = h * double(x - made.law.peak);
    if (state == kInTail) {
      mine.tail.total += h, mine.tail.moment += moment;
    } else {
      mine.head.total += h, mine.head.moment += moment;
    }
  });
  mine = over_cluster(mine, ClosedSums::join, static_cast<ClosedSums*>(joins));
  if (threadIdx.x == 0) *all = mine;
}

// Of the larger one of a pair's logits: lists of either row have room for it.
template <class S, class T>
constexpr unsigned kLogitBytes = sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T);

// Brings both rows into slots and fills in what `s` and `t` have besides their laws; false where more is open than
// there is room for. Each row is read twice, and once more where the second level is needed.
template <class S, class T>
__device__ inline bool bin_pair(const S* student, const T* teacher, const LogitsRows (&sides)[2], unsigned top_k,
                                const BinMemory& memory, BinnedRow<S>& s, BinnedRow<T>& t, void* joins) {
  using A = Accumulator<S>;
  Extent<A> mine;
  sample(student, sides[0], s.law, mine);
  sample(teacher, sides[1], t.law, mine);
  SlotIndex<A> index = index_of(over_cluster(mine, Extent<A>::join, static_cast<Extent<A>*>(joins)), memory);
  Opening opening{};
#pragma unroll 1
  for (int level = 0; level < 2; ++level) {
    unsigned* const counters = level ? memory.counters(0) : memory.ranks[0];
    unsigned* const other_counters = level ? memory.counters(1) : memory.ranks[1];
    count_slots(student, sides[0], s.law, index, counters);
    count_slots(teacher, sides[1], t.law, index, other_counters);
    cluster_sync();
    ranks_of_counters(counters, other_counters, memory, joins);
    opening = open_slots(memory, top_k, level == 0, joins);
    if (opening.parts == 0) break;
    index.parts = opening.parts;
  }
  s.index = t.index = index;
  if (!opening.fits) return false;

  auto* const s_keys = memory.list<DescendingKey<S>>(0, kLogitBytes<S, T>);
  auto* const t_keys = memory.list<DescendingKey<T>>(1, kLogitBytes<S, T>);
  s.keys = s_keys, s.listed = opening.logits.of[0];
  t.keys = t_keys, t.listed = opening.logits.of[1];
  unsigned* const found = of_block(memory.found, 0);
  read_slots(student, sides[0], s, s_keys, found, memory.sums, joins);
  read_slots(teacher, sides[1], t, t_keys, found + 1, memory.sums + 1, joins);
  uint32_t* const none = nullptr;
  sort_keys(s_keys, memory.list<DescendingKey<S>>(2, kLogitBytes<S, T>), none, none, int(s.listed), *memory.sort);
  sort_keys(t_keys, memory.list<DescendingKey<T>>(2, kLogitBytes<S, T>), none, none, int(t.listed), *memory.sort);
  return true;
}

}  // namespace mlot::cuda
