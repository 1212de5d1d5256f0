// One of the two rows of sorted_l1: its scalars, its elements by bins and as runs, the sums and steps of its signs.
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

// One side's elements by bins that it shares with the other side.
template <class A>
struct BinnedElements {
  BinScale<A> scale;
  std::vector<uint32_t> counts;  // [bins]
  std::vector<int8_t> signs;     // [bins], of Piece's or kOpenBin
  std::vector<A> weights;        // [bins]

  void clear(const BinScale<A>& own) {
    scale = own;
    counts.assign(own.bins, 0), signs.resize(own.bins);
  }
};

// The bins from `first` to the end of the second level that hold what open bins [first, last) of the first level hold.
struct BinRange {
  int64_t first, last;

  BinRange finer() const {
    return {std::max(int64_t(0), kFiner * first - kFiner / 2),
            last == kBins ? kFiner * kBins : kFiner * (last - 1) + kFiner / 2 + 1};
  }
};

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
  std::vector<Piece> pieces;  // of the runs that are being compared
  BinnedElements<A> bins[2];  // of all elements; of those in open bins of the first level

  // Reads the row for its scalars; false where its distribution is not defined.
  bool start(int64_t slot) {
    clear(slot);
    sums_needed_ = true;
    if constexpr (kCounted) {
      histogram_.count(x_, rows_.column_mask, rows_.vocab_size, values_);
      count_statistics();
    } else {
      const TemperaturePair alone{0, -1, 1};
      ExponentialSums sums;
      row = row_statistics(x_, rows_.vocab_size, rows_.standardize, rows_.temperatures, 1, &alone, 1, &sums, &log_total,
                           &expected, 1, static_cast<A*>(nullptr));
    }
    return weigh(slot);
  }

  // The same where forward has left the scalars; without `sums` only steps are made.
  bool start_again(int64_t slot, const SortedL1Saved<const void*>& saved, bool sums) {
    if constexpr (kCounted) return start(slot);
    clear(slot);
    sums_needed_ = sums;
    const auto at = [slot](const void* scalars) { return static_cast<const A*>(scalars)[slot]; };
    row = {at(saved.peak), at(saved.mean), at(saved.scale), at(saved.slope)};
    log_total = at(saved.log_total);
    return weigh(slot);
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
    bins[0].clear({row.peak, A((largest - log2_weight_) / double(factor_)), A(per_bit * double(factor_))});
    if constexpr (kCounted) {
      for (int64_t i = 0; i < runs.size(); ++i) bins[0].counts[bin_of(runs.x[i], bins[0].scale)] += runs.count[i];
    } else if (weight_ > 0) {
      count_bins(x_, rows_.column_mask, rows_.vocab_size, bins[0].scale, bins[0].counts.data());
    }
  }

  // The same for elements in open bins of the first level.
  void count_open() {
    bins[1].clear(bins[0].scale.finer());
    if constexpr (kCounted) {
      for (int64_t i = 0; i < runs.size(); ++i) {
        if (bins[0].signs[bin_of(runs.x[i], bins[0].scale)] != kOpenBin) continue;
        bins[1].counts[bin_of(runs.x[i], bins[1].scale)] += runs.count[i];
      }
    } else {
      count_bins(open_.data(), nullptr, open_size(), bins[1].scale, bins[1].counts.data());
    }
  }

  // Makes the sums over the bins whose signs are known, and finds the elements of the others.
  void open_bins() {
    open_.clear();
    if constexpr (!kCounted) {
      if (weight_ > 0) open_level(x_, rows_.column_mask, rows_.vocab_size, bins[0], open_);
    }
  }

  void open_finer_bins() {
    if constexpr (!kCounted) {
      open_level(open_.data(), nullptr, open_size(), bins[1], finer_open_);
      open_.swap(finer_open_);
    }
  }

  int64_t open_size() const { return int64_t(open_.size()); }

  void make_runs() {
    next_run_ = 0;
    if constexpr (!kCounted) {
      runs_of(open_, keys_, other_keys_, runs);
      find_probabilities();
    }
  }

  // The next runs, of `n` elements or as many as there are; the last bin counts -inf, too, which is no run.
  RankedRuns next_runs(int64_t n, int64_t rank) {
    const int64_t first = next_run_;
    for (; n > 0 && next_run_ < runs.size(); ++next_run_) n -= runs.count[next_run_];
    return {first, next_run_, rank};
  }

  // All elements of a bin have its sign. `around` is the first of the open bins of the first level that it belongs to.
  void add_bin(int level, int64_t bin, int64_t around) {
    const uint32_t n = bins[level].counts[bin];
    const int8_t sign = bins[level].signs[bin];
    if (n == 0) return;
    if constexpr (kCounted) {
      const RankedRuns own = next_runs(n, 0);
      pieces.push_back({uint32_t(own.first), uint32_t(own.last), n, sign});
      add_pieces(true);
    } else {
      steps.add(own_sign(sign), A(sign == kTail), [&] {
        const A edge = upper_edge(bin, bins[level].scale);
        return level == 0 ? edge : std::min(edge, upper_edge(around, bins[0].scale));
      });
    }
  }

  // Adds the compared runs to the sums and the steps.
  void add_pieces(bool mean_over_ties) {
    for (const Piece& piece : pieces) {
      if (!sums_needed_) break;
      const WeightedSums own = sum_of(piece);
      const double sign = piece.sign == kTail ? 1 : direction_ * piece.sign;
      add(piece.sign == kTail ? tail : head, {sign * own.total, sign * own.moment});
    }
    for (size_t next = 0; next < pieces.size();) next = add_run(next, mean_over_ties);
    pieces.clear();
  }

  // Joins the tail, whose sum's sign is now known.
  void finish(int tail_sign) {
    head.total += direction_ * tail_sign * tail.total;
    head.moment += direction_ * tail_sign * tail.moment;
    steps.finish(A(direction_ * tail_sign));
  }

  // W of logits.py.
  double moment() const { return head.moment - head.total * double(expected); }

 private:
  void clear(int64_t slot) {
    x_ = row_of<T>(rows_, slot);
    head = {}, tail = {};
    steps.clear(), runs.clear(), pieces.clear();
  }

  // Once the row's scalars are known; false where its distribution is not defined.
  bool weigh(int64_t slot) {
    const double log_scale = rows_.log_scale ? double(static_cast<const A*>(rows_.log_scale)[slot]) : 0;
    weight_ = A(std::exp(log_scale - double(log_total)));
    log2_weight_ = (log_scale - double(log_total)) * kLog2E;
    factor_ = A(kLog2E / (rows_.temperatures[0] * double(row.scale)));
    if (!(std::isfinite(log_total) && weight_ == weight_)) return false;
    if constexpr (kCounted) keep_runs();
    return true;
  }

  double log2_p(A x) const { return double(x - row.peak) * double(factor_) + log2_weight_; }

  A own_sign(int32_t sign) const { return A(sign == kTail ? 0 : direction_ * sign); }

  void open_level(const A* x, const bool* mask, int64_t n, BinnedElements<A>& level, Room<A>& open) {
    const auto sum = [&](Room<A>* found) {
      if (!sums_needed_) return sum_bins<false>(x, mask, n, level.scale, factor_, level.weights.data(), found);
      WeightedSums sums = sum_bins<true>(x, mask, n, level.scale, factor_, level.weights.data(), found);
      sums.total *= double(weight_), sums.moment *= double(weight_);
      return sums;
    };
    level.weights.resize(level.scale.bins);
    bool any_tail = false;
    for (int64_t b = 0; b < level.scale.bins; ++b) {
      const int8_t sign = level.signs[b];
      any_tail |= sign == kTail && level.counts[b] > 0;
      level.weights[b] = sign == kOpenBin ? A(kOpen) : own_sign(sign);
    }
    open.clear();
    add(head, sum(&open));
    if (!any_tail || !sums_needed_) return;
    for (int64_t b = 0; b < level.scale.bins; ++b) level.weights[b] = level.signs[b] == kTail;
    add(tail, sum(nullptr));
  }

  static void add(WeightedSums& sums, const WeightedSums& more) {
    sums.total += more.total;
    sums.moment += more.moment;
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

  // Of weight p and p (x - peak), where one run's part counts by its ranks.
  WeightedSums sum_of(const Piece& piece) const {
    WeightedSums sums;
    if (piece.last == piece.run + 1) {
      sums.total = double(runs.p[piece.run]) * piece.ranks;
      sums.moment = sums.total * double(runs.x[piece.run] - row.peak);
      return sums;
    }
    // A lane adds few terms in A: what is small would vanish beside the sum of many.
    constexpr int64_t kTerms = 16 * kWidth<A>;
    typedef int32_t Counts __attribute__((vector_size(4 * kWidth<A>)));
    int64_t i = piece.run;
    while (i + kWidth<A> <= piece.last) {
      const int64_t end = std::min(i + kTerms, int64_t(piece.last));
      Vector<A> total = {}, moment = {};
      for (; i + kWidth<A> <= end; i += kWidth<A>) {
        Counts counts;
        __builtin_memcpy(&counts, &runs.count[i], sizeof(counts));
        const Vector<A> p = load(&runs.p[i]) * __builtin_convertvector(counts, Vector<A>);
        total += p;
        moment += p * (load(&runs.x[i]) - row.peak);
      }
      sums.total += double(sum<A>(total)), sums.moment += double(sum<A>(moment));
    }
    for (; i < piece.last; ++i) {
      const double p = double(runs.p[i]) * runs.count[i];
      sums.total += p, sums.moment += p * double(runs.x[i] - row.peak);
    }
    return sums;
  }

  // The pieces of one run from `next` on, or one of several runs, become steps; returns the next one.
  size_t add_run(size_t next, bool mean_over_ties) {
    const uint32_t run = pieces[next].run;
    const auto threshold = [&] { return value_above(runs.x[run]); };
    const auto add = [&](const Piece& piece) { steps.add(own_sign(piece.sign), A(piece.sign == kTail), threshold); };
    size_t end = next + 1;
    while (end < pieces.size() && pieces[end].run == run) ++end;
    if (end == next + 1) {
      add(pieces[next]);
      return end;
    }
    if (mean_over_ties) {
      double sum = 0, in_tail = 0;
      for (; next < end; ++next) {
        const auto& [_, last, ranks, sign] = pieces[next];
        sum += double(own_sign(sign)) * ranks;
        in_tail += sign == kTail ? ranks : 0;
      }
      steps.add(A(sum / runs.count[run]), A(in_tail / runs.count[run]), threshold);
    } else {
      for (; next < end; ++next) {
        const int32_t sign = pieces[next].sign;
        steps.add_split(own_sign(sign), A(sign == kTail), threshold(), pieces[next].ranks);
      }
    }
    return end;
  }

  const LogitsRows& rows_;
  const int direction_;
  const T* x_ = nullptr;
  A weight_, factor_;  // p = 2^((x - peak) factor) weight
  double log2_weight_;
  bool sums_needed_;
  int64_t next_run_;
  KeyHistogram<T> histogram_;
  CountedValues values_;
  std::vector<A> e_;
  Room<A> open_, finer_open_;
  Room<UnsignedKey<A>> keys_, other_keys_;
};

}  // namespace mlot::MLOT_ISA
