// Two rows of probabilities are brought into order, as far as the signs of p_(i) - q_(i) need it.
#pragma once

#include <algorithm>
#include <numeric>

#include "mlot/cpu/sorted_l1_side.h"

namespace mlot::MLOT_ISA {

// Where the elements of both sides above a place end.
struct RanksAbove {
  int64_t student = 0, teacher = 0;
};

// The signs of a range of bins, from how many elements of each side are in them and `above`.
template <class S, class T>
static inline void sign_bins(BinnedElements<S>& s, BinnedElements<T>& t, BinRange range, int64_t top_k,
                             RanksAbove& above) {
  auto& [P, Q] = above;
  for (int64_t b = range.first; b < range.last; ++b) {
    const int64_t p_end = P + s.counts[b], q_end = Q + t.counts[b];
    const bool straddles = (P < top_k && top_k < p_end) || (Q < top_k && top_k < q_end);
    const bool crossed = P < q_end && Q < p_end;
    int8_t sign = P >= q_end ? 1 : -1;
    if (straddles || (crossed && (P < top_k || Q < top_k))) {
      s.signs[b] = t.signs[b] = kOpenBin;
    } else {
      s.signs[b] = P >= top_k ? int8_t(kTail) : sign;
      t.signs[b] = Q >= top_k ? int8_t(kTail) : sign;
    }
    P = p_end, Q = q_end;
  }
}

// Open bins without a closed one with elements between them.
template <class S, class T>
static inline BinRange open_range(const BinnedElements<S>& s, const BinnedElements<T>& t, int64_t first, int64_t end) {
  int64_t last = first + 1;
  while (last < end && (s.signs[last] == kOpenBin || s.counts[last] + t.counts[last] == 0)) ++last;
  return {first, last};
}

// Whether bins of the second level can tell many of the elements in open bins apart.
template <class S, class T>
static inline bool worth_finer_bins(const SideOrder<S>& s, const SideOrder<T>& t) {
  constexpr int64_t kEnough = 8192, kCrowd = 32;  // elements; those of a bin of the second level
  const int64_t elements = s.open_size() + t.open_size();
  if (elements < kEnough) return false;
  int64_t used = 0;
  for (int64_t b = 0; b < kBins; ++b) {
    used += s.bins[0].signs[b] == kOpenBin && s.bins[0].counts[b] + t.bins[0].counts[b] > 0;
  }
  return elements < used * kFiner * kCrowd;
}

// Signs for bins of the second level within each range of open bins of the first. Returns the share of
// elements in open bins that are in open bins of the second level, too.
template <class S, class T>
static inline double sign_finer_bins(SideOrder<S>& s, SideOrder<T>& t, int64_t top_k) {
  s.count_open(), t.count_open();
  RanksAbove above;
  int64_t all = 0, open = 0;
  auto& [s_first, s_second] = s.bins;
  auto& [t_first, t_second] = t.bins;
  for (int64_t b = 0; b < kBins;) {
    if (s_first.signs[b] != kOpenBin) {
      above.student += s_first.counts[b], above.teacher += t_first.counts[b];
      ++b;
      continue;
    }
    const BinRange range = open_range(s_first, t_first, b, kBins), finer = range.finer();
    sign_bins(s_second, t_second, finer, top_k, above);
    for (int64_t f = finer.first; f < finer.last; ++f) {
      const int64_t n = s_second.counts[f] + t_second.counts[f];
      all += n;
      if (s_second.signs[f] == kOpenBin) open += n;
    }
    b = range.last;
  }
  return all > 0 ? double(open) / double(all) : 1;
}

// Walks down a range of bins of one level; ranges of open ones go to `open`.
template <class S, class T, class Open>
static inline void walk_bins(SideOrder<S>& s, SideOrder<T>& t, int level, BinRange range, int64_t around,
                             RanksAbove& above, const Open& open) {
  for (int64_t b = range.first; b < range.last;) {
    if (s.bins[level].signs[b] == kOpenBin) {
      const BinRange own = open_range(s.bins[level], t.bins[level], b, range.last);
      open(own);
      b = own.last;
    } else {
      s.add_bin(level, b, around), t.add_bin(level, b, around);
      above.student += s.bins[level].counts[b], above.teacher += t.bins[level].counts[b];
      ++b;
    }
  }
}

template <class S, class T>
static inline void order_binned(SideOrder<S>& s, SideOrder<T>& t, const SortedL1Options& options) {
  double smallest = INFINITY, largest = -INFINITY;
  s.extend(smallest, largest), t.extend(smallest, largest);
  if (!(smallest <= largest)) smallest = largest = 0;
  const double margin = (largest - smallest) / 4, range = largest - smallest + 2 * margin;
  const double per_bit = range > 0 ? double(kBins - 2) / range : 1;
  s.count(largest + margin, per_bit), t.count(largest + margin, per_bit);
  RanksAbove above;
  sign_bins(s.bins[0], t.bins[0], {0, kBins}, options.top_k, above);
  s.open_bins(), t.open_bins();
  const bool finer = worth_finer_bins(s, t) && sign_finer_bins(s, t, options.top_k) < 0.5;
  if (finer) s.open_finer_bins(), t.open_finer_bins();
  s.make_runs(), t.make_runs();
  above = {};
  const auto compare = [&](int level, BinRange own) {
    const auto elements = [&](const auto& side) {
      const auto& counts = side.bins[level].counts;
      return std::accumulate(counts.begin() + own.first, counts.begin() + own.last, int64_t(0));
    };
    const int64_t in_s = elements(s), in_t = elements(t);
    compare_runs(s.runs, s.next_runs(in_s, above.student), t.runs, t.next_runs(in_t, above.teacher), options.top_k,
                 s.pieces, t.pieces);
    s.add_pieces(options.mean_over_ties), t.add_pieces(options.mean_over_ties);
    above.student += in_s, above.teacher += in_t;
  };
  walk_bins(s, t, 0, {0, kBins}, 0, above, [&](BinRange open) {
    if (!finer) return compare(0, open);
    walk_bins(s, t, 1, open.finer(), open.first, above, [&](BinRange open_finer) { compare(1, open_finer); });
  });
}

// Orders the two rows at a slot, which both have `started`.
template <class S, class T>
static inline void order_started(SideOrder<S>& s, SideOrder<T>& t, const SortedL1Options& options) {
  if constexpr (SideOrder<S>::kCounted && SideOrder<T>::kCounted) {
    compare_runs(s.runs, {0, s.runs.size(), 0}, t.runs, {0, t.runs.size(), 0}, options.top_k, s.pieces, t.pieces);
    s.add_pieces(options.mean_over_ties), t.add_pieces(options.mean_over_ties);
  } else {
    order_binned(s, t, options);
  }
  const double difference = s.tail.total - t.tail.total;
  const int tail_sign = options.bucket ? (difference > 0) - (difference < 0) : 0;
  s.finish(tail_sign), t.finish(tail_sign);
}

// Orders the two rows at `slot`; what it finds is in the sides. Returns false where a distribution is not defined; its
// scalars are then NaN, and the other side's are its own.
template <class S, class T>
static inline bool order_pair(SideOrder<S>& s, SideOrder<T>& t, int64_t slot, const SortedL1Options& options) {
  const bool s_defined = s.start(slot), t_defined = t.start(slot);
  if (s_defined && t_defined) order_started(s, t, options);
  return s_defined && t_defined;
}

}  // namespace mlot::MLOT_ISA
