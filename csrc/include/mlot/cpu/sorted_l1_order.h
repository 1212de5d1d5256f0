// Two rows of probabilities are brought into order, as far as the signs of p_(i) - q_(i) need it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "mlot/cpu/key_histogram.h"
#include "mlot/cpu/logits.h"
#include "mlot/cpu/probability_bins.h"
#include "mlot/cpu/run_length.h"
#include "mlot/cpu/sorted_l1.h"
#include "mlot/cpu/sorted_l1_steps.h"

namespace mlot::MLOT_ISA {

// A bin of one side: every sign in it, or that its elements are told apart.
constexpr int8_t kOpenBin = 3;

// One side's row: its scalars, its order, and in the end the sums and steps of its signs. 16-bit rows are counted by
// value, and are nothing but runs from there on; of others the runs are those in open bins.
template <class T>
class SideOrder {
 public:
  using A = Accumulator<T>;
  static constexpr bool kCounted = sizeof(T) == 2;

  // direction: of the derivative by this side's probabilities, 1 for the student and -1 for the teacher.
  SideOrder(const LogitsRows& rows, int direction) : rows_(rows), direction_(direction) {}

  RowStatistics<A> row;
  A log_total, expected;
  WeightedSums head, tail;  // of sign p below rank top_k; of p from there on
  Steps<A> steps;
  Runs<A> runs;
  std::vector<Piece> pieces;
  std::vector<uint32_t> counts;  // [kBins]
  std::vector<int8_t> signs;     // [kBins], of Piece's or kOpenBin

  // Reads the row for its scalars; false where its distribution is not defined.
  bool start(int64_t slot) {
    x_ = row_of<T>(rows_, slot);
    head = {}, tail = {};
    steps.clear(), runs.clear(), pieces.clear();
    if constexpr (kCounted) {
      histogram_.count(x_, rows_.column_mask, rows_.vocab_size, values_);
      count_statistics();
    } else {
      const TemperaturePair alone{0, -1, 1};
      ExponentialSums sums;
      row = row_statistics(x_, rows_.vocab_size, rows_.standardize, rows_.temperatures, 1, &alone, 1, &sums, &log_total,
                           &expected, 1, static_cast<A*>(nullptr));
    }
    const double log_scale = rows_.log_scale ? double(static_cast<const A*>(rows_.log_scale)[slot]) : 0;
    weight_ = A(std::exp(log_scale - double(log_total)));
    log2_weight_ = (log_scale - double(log_total)) * kLog2E;
    factor_ = A(kLog2E / (rows_.temperatures[0] * double(row.scale)));
    if (!(std::isfinite(log_total) && weight_ == weight_)) return false;
    if constexpr (kCounted) keep_runs();
    return true;
  }

  // The smallest and the largest log2 p of a sample of the row, joined with those given.
  void extend(double& smallest, double& largest) const {
    if constexpr (!kCounted) {
      constexpr int64_t kSample = 256;
      const int64_t stride = std::max(int64_t(1), rows_.vocab_size / kSample);
      A low = INFINITY, high = -INFINITY;
      for (int64_t j = 0; j < rows_.vocab_size; j += stride) {
        if (x_[j] == A(-INFINITY) || (rows_.column_mask && !rows_.column_mask[j])) continue;
        low = std::min(low, x_[j]), high = std::max(high, x_[j]);
      }
      if (low > high || !std::isfinite(log2_weight_)) return;
      smallest = std::min(smallest, log2_p(low)), largest = std::max(largest, log2_p(high));
    }
  }

  // How many elements are in each bin of log2 p, from `largest` down, `per_bit` of them for a factor of 2.
  void count(double largest, double per_bit) {
    scale_ = {row.peak, A((largest - log2_weight_) / double(factor_)), A(per_bit * double(factor_))};
    counts.assign(kBins, 0);
    if constexpr (kCounted) {
      for (int64_t i = 0; i < runs.size(); ++i) counts[bin_of(runs.x[i], scale_)] += runs.count[i];
    } else if (weight_ > 0) {
      count_bins(x_, rows_.column_mask, rows_.vocab_size, scale_, counts.data());
    }
  }

  // Makes the sums over the bins whose signs are known, and the runs of the others.
  void open_bins() {
    if constexpr (!kCounted) {
      if (weight_ == 0) return;
      weights_.resize(kBins);
      bool any_tail = false;
      for (int64_t b = 0; b < kBins; ++b) {
        const int8_t sign = signs[b];
        any_tail |= sign == kTail && counts[b] > 0;
        weights_[b] = sign == kOpenBin ? A(kOpen) : sign == kTail ? A(0) : A(direction_ * sign);
      }
      keys_.clear();
      head = sum(&keys_);
      runs_of(keys_, other_keys_, runs);
      find_probabilities();
      if (!any_tail) return;
      for (int64_t b = 0; b < kBins; ++b) weights_[b] = signs[b] == kTail;
      tail = sum(nullptr);
    }
  }

  // The runs of a bin, from `first` on, which becomes the next bin's. The last bin counts -inf, too, which is no run.
  RankedRuns runs_in(int64_t bin, int64_t rank, int64_t& first) const {
    const int64_t begin = first;
    for (int64_t n = counts[bin]; n > 0 && first < runs.size(); ++first) n -= runs.count[first];
    return {begin, first, rank};
  }

  bool has_runs(int64_t bin) const { return kCounted || signs[bin] == kOpenBin; }

  void take_bin(RankedRuns range, int32_t sign) {
    for (int64_t i = range.first; i < range.last; ++i) pieces.push_back({uint32_t(i), runs.count[i], sign});
  }

  void sum_pieces() {
    for (const Piece& piece : pieces) {
      const double p = double(runs.p[piece.run]) * piece.length, below = double(runs.x[piece.run] - row.peak);
      WeightedSums& sums = piece.sign == kTail ? tail : head;
      const double own = piece.sign == kTail ? 1 : direction_ * piece.sign;
      sums.total += own * p;
      sums.moment += own * p * below;
    }
  }

  // Joins the tail, whose sum's sign is now known, and makes the steps.
  void finish(int tail_sign, bool binned, bool mean_over_ties) {
    const int own_tail = direction_ * tail_sign;
    head.total += own_tail * tail.total;
    head.moment += own_tail * tail.moment;
    const auto own = [=, this](int32_t sign) { return sign == kTail ? own_tail : direction_ * sign; };
    size_t next = 0;
    if (!binned || kCounted) {
      while (next < pieces.size()) add_run(next, own, mean_over_ties);
    } else if (weight_ > 0) {
      for (int64_t b = 0; b < kBins; ++b) {
        if (counts[b] == 0) continue;
        if (signs[b] == kOpenBin) {
          for (int64_t n = counts[b]; n > 0 && next < pieces.size();) {
            n -= runs.count[pieces[next].run];
            add_run(next, own, mean_over_ties);
          }
        } else {
          steps.add(A(own(signs[b])), [&] { return b == 0 ? A(INFINITY) : upper_edge(b, scale_); });
        }
      }
    }
    if (steps.size() == 0) steps.add(A(0), [] { return A(INFINITY); });
  }

  // W of logits.py.
  double moment() const { return head.moment - head.total * double(expected); }

 private:
  double log2_p(A x) const { return double(x - row.peak) * double(factor_) + log2_weight_; }

  WeightedSums sum(std::vector<UnsignedKey<A>>* open) const {
    WeightedSums sums = sum_bins(x_, rows_.column_mask, rows_.vocab_size, scale_, factor_, weights_.data(), open);
    sums.total *= double(weight_), sums.moment *= double(weight_);
    return sums;
  }

  void find_probabilities() {
    runs.p.resize(runs.x.size());
    probabilities(runs.x.data(), runs.size(), row.peak, factor_, weight_, runs.p.data());
  }

  // The scalars of a row that is counted by value, each in one sum over its distinct values.
  void count_statistics() {
    const auto& [x, all, kept, nan] = values_;
    row = {A(0), A(0), A(1), A(0)};
    log_total = expected = NAN;
    if (nan || x.empty() || x[0] == A(INFINITY)) return;
    row.peak = x[0];
    if (rows_.standardize) {
      double n = 0, sum = 0, squares = 0;
      for (size_t i = 0; i < x.size(); ++i) n += all[i], sum += all[i] * double(x[i] - row.peak);
      const double mean = sum / n;
      for (size_t i = 0; i < x.size(); ++i) {
        const double difference = double(x[i] - row.peak) - mean;
        squares += all[i] * (difference * difference);
      }
      const double deviation = n > 1 ? std::sqrt(squares / (n - 1)) : 0, scale = deviation + kDeviationOffset;
      row.mean = A(mean), row.scale = A(scale);
      row.slope = deviation == 0 ? A(0) : A(1 / ((n - 1) * deviation * scale * scale));
    }
    const A factor = A(kLog2E / (rows_.temperatures[0] * double(row.scale)));
    e_.resize(x.size());
    probabilities(x.data(), int64_t(x.size()), row.peak, factor, A(1), e_.data());
    double total = 0, moment = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      total += all[i] * double(e_[i]);
      moment += all[i] * double(e_[i]) * double(x[i] - row.peak);
    }
    log_total = A(std::log(total));
    expected = A(moment / total);
  }

  void keep_runs() {
    if (weight_ == 0) return;
    size_t made = 0;
    runs.x.resize(values_.x.size()), runs.p.resize(values_.x.size()), runs.count.resize(values_.x.size());
    for (size_t i = 0; i < values_.x.size(); ++i) {
      if (values_.kept[i] == 0) continue;
      runs.x[made] = values_.x[i], runs.p[made] = e_[i] * weight_, runs.count[made] = values_.kept[i];
      ++made;
    }
    runs.x.resize(made), runs.p.resize(made), runs.count.resize(made);
  }

  // The pieces of one run from `next` on become steps.
  template <class Own>
  void add_run(size_t& next, const Own& own, bool mean_over_ties) {
    const uint32_t run = pieces[next].run;
    const auto threshold = [&] { return steps.size() == 0 ? A(INFINITY) : value_above(runs.x[run]); };
    if (next + 1 == pieces.size() || pieces[next + 1].run != run) {
      steps.add(A(own(pieces[next].sign)), threshold);
      ++next;
      return;
    }
    size_t end = next;
    double sum = 0;
    bool several = false;
    for (; end < pieces.size() && pieces[end].run == run; ++end) {
      sum += double(own(pieces[end].sign)) * pieces[end].length;
      several |= own(pieces[end].sign) != own(pieces[next].sign);
    }
    if (several && !mean_over_ties) {
      const A below = threshold();
      for (; next < end; ++next) steps.add_split(A(own(pieces[next].sign)), below, pieces[next].length);
    } else {
      steps.add(several ? A(sum / runs.count[run]) : A(own(pieces[next].sign)), threshold);
    }
    next = end;
  }

  const LogitsRows& rows_;
  const int direction_;
  const T* x_ = nullptr;
  A weight_, factor_;  // p = 2^((x - peak) factor) weight
  double log2_weight_;
  BinScale<A> scale_;
  KeyHistogram<T> histogram_;
  CountedValues values_;
  std::vector<A> e_, weights_;
  std::vector<UnsignedKey<A>> keys_, other_keys_;
};

// The signs of all bins, from how many elements of each side are in them.
template <class S, class T>
static inline void sign_bins(SideOrder<S>& s, SideOrder<T>& t, int64_t top_k) {
  s.signs.resize(kBins), t.signs.resize(kBins);
  int64_t P = 0, Q = 0;  // elements above the bin
  for (int64_t b = 0; b < kBins; ++b) {
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

// Compares bin by bin.
template <class S, class T>
static inline void compare_bins(SideOrder<S>& s, SideOrder<T>& t, int64_t top_k) {
  int64_t P = 0, Q = 0, next_s = 0, next_t = 0;
  for (int64_t b = 0; b < kBins; ++b) {
    if (s.signs[b] == kOpenBin || SideOrder<S>::kCounted || SideOrder<T>::kCounted) {
      const RankedRuns in_s = s.has_runs(b) ? s.runs_in(b, P, next_s) : RankedRuns{0, 0, P};
      const RankedRuns in_t = t.has_runs(b) ? t.runs_in(b, Q, next_t) : RankedRuns{0, 0, Q};
      if (s.signs[b] == kOpenBin) {
        compare_runs(s.runs, in_s, t.runs, in_t, top_k, s.pieces, t.pieces);
      } else {
        s.take_bin(in_s, s.signs[b]), t.take_bin(in_t, t.signs[b]);
      }
    }
    P += s.counts[b], Q += t.counts[b];
  }
}

// Orders the two rows at `slot`; what it finds is in the sides. Returns false where a distribution is not defined; its
// scalars are then NaN, and the other side's are its own.
template <class S, class T>
static inline bool order_pair(SideOrder<S>& s, SideOrder<T>& t, int64_t slot, const SortedL1Options& options) {
  const bool s_defined = s.start(slot), t_defined = t.start(slot);
  if (!s_defined || !t_defined) return false;
  constexpr bool kBinned = !(SideOrder<S>::kCounted && SideOrder<T>::kCounted);
  if constexpr (kBinned) {
    double smallest = INFINITY, largest = -INFINITY;
    s.extend(smallest, largest), t.extend(smallest, largest);
    if (!(smallest <= largest)) smallest = largest = 0;
    const double margin = (largest - smallest) / 4, range = largest - smallest + 2 * margin;
    const double per_bit = range > 0 ? double(kBins - 2) / range : 1;
    s.count(largest + margin, per_bit), t.count(largest + margin, per_bit);
    sign_bins(s, t, options.top_k);
    s.open_bins(), t.open_bins();
    compare_bins(s, t, options.top_k);
  } else {
    compare_runs(s.runs, {0, s.runs.size(), 0}, t.runs, {0, t.runs.size(), 0}, options.top_k, s.pieces, t.pieces);
  }
  s.sum_pieces(), t.sum_pieces();
  const double difference = s.tail.total - t.tail.total;
  const int tail_sign = options.bucket ? (difference > 0) - (difference < 0) : 0;
  s.finish(tail_sign, kBinned, options.mean_over_ties), t.finish(tail_sign, kBinned, options.mean_over_ties);
  return true;
}

}  // namespace mlot::MLOT_ISA
