// rank_truncate and gather_columns on a CPU; compiled once per instruction set.
#include "mlot/cpu/rank_truncate.h"

#include "mlot/cpu/column_ranking.h"
#include "mlot/cpu/row_gradient.h"

namespace mlot::MLOT_ISA {
namespace {

// Rows whose statistics are made before they are ranked. Enough to share among threads; few enough that their tiles'
// maxima stay below the promised memory, and their logits in the last cache if that is large.
constexpr int64_t kGroupRows = 64;

// One call of forward: a group's statistics, its ranking and its log-probabilities; then the next group.
template <class T>
class Forward {
  using A = Accumulator<T>;

 public:
  Forward(const RankTruncateForward& call, const Parallel& parallel)
      : call_(call),
        rows_(call.rows),
        parallel_(parallel),
        slots_(rows_.all_slots()),
        tiles_(tiles_of(rows_.vocab_size)) {
    pairs_.resize(rows_.temperature_count);
    pairs_.resize(pair_temperatures(rows_.temperatures, rows_.temperature_count, pairs_.data()));
  }

  void run() {
    for (int64_t first = 0; first < rows_.sequences;) {
      int64_t last = first, counted = 0;
      while (last < rows_.sequences && (counted < kGroupRows || ranks_batch())) {
        for (int64_t a = 0; a < rows_.slots; ++a) counted += rows_.index[last * rows_.slots + a] >= 0;
        ++last;
      }
      group(first, last);
      first = last;
    }
  }

 private:
  bool ranks_batch() const { return call_.scope == RankScope::batch && !call_.given; }
  bool ranks_together() const { return call_.scope != RankScope::token && !call_.given; }

  A* log_total() const { return static_cast<A*>(call_.saved.log_total); }
  A* expected() const { return static_cast<A*>(call_.saved.expected); }

  // Sequences [first, last).
  void group(int64_t first, int64_t last) {
    list_rows(first, last);
    const int64_t start = first * rows_.slots, n = (last - first) * rows_.slots;
    parallel_(n, worth_a_thread(rows_.vocab_size),
              [&](int64_t from, int64_t to) { statistics(start, start + from, start + to); });
    if (ranks_together()) {
      rank(first);
    } else {
      poisoned_.assign(last - first, false);
      const int64_t each = call_.scope == RankScope::token ? call_.k * rows_.slots : call_.k;
      if (call_.given) std::copy_n(call_.given + first * each, (last - first) * each, call_.columns + first * each);
    }
    parallel_(n, 64, [&](int64_t from, int64_t to) {
      for (int64_t slot = start + from; slot < start + to; ++slot) gather(slot, poisoned_[slot / rows_.slots - first]);
    });
  }

  // The group's counted rows, and which of them are ranked together.
  void list_rows(int64_t first, int64_t last) {
    weighted_.clear();
    rankings_.clear();
    ordinal_.assign((last - first) * rows_.slots, -1);
    for (int64_t b = first; b < last; ++b) {
      if (b == first || !ranks_batch()) rankings_.emplace_back().first = int64_t(weighted_.size());
      int64_t of_sequence = 0;
      for (int64_t a = 0; a < rows_.slots; ++a) {
        if (rows_.index[b * rows_.slots + a] < 0) continue;
        ordinal_[(b - first) * rows_.slots + a] = int64_t(weighted_.size());
        weighted_.push_back({row_of<T>(rows_, b * rows_.slots + a), 0, 0, 0, of_sequence++ % kPartialRows == 0});
      }
      rankings_.back().last = int64_t(weighted_.size());
    }
    if (ranks_together()) bounds_.resize(weighted_.size() * tiles_);
  }

  void statistics(int64_t start, int64_t from, int64_t to) {
    std::vector<ExponentialSums> sums(rows_.temperature_count);
    SelectScratch<A> scratch;
    for (int64_t slot = from; slot < to; ++slot) {
      const int64_t i = ordinal_[slot - start];
      RowStatistics<A> row{};
      if (i < 0) {
        for (int64_t r = 0; r < rows_.temperature_count; ++r) {
          log_total()[r * slots_ + slot] = expected()[r * slots_ + slot] = 0;
        }
      } else {
        row = row_statistics(weighted_[i].x, rows_.vocab_size, rows_.standardize, rows_.temperatures,
                             rows_.temperature_count, pairs_.data(), int64_t(pairs_.size()), sums.data(),
                             log_total() + slot, expected() + slot, slots_,
                             ranks_together() ? bounds_.data() + i * tiles_ : nullptr);
        weigh(weighted_[i], row, slot);
        if (ranks_together()) maxima_to_bounds(weighted_[i], bounds_.data() + i * tiles_, tiles_);
      }
      static_cast<A*>(call_.saved.peak)[slot] = row.peak;
      static_cast<A*>(call_.saved.mean)[slot] = row.mean;
      static_cast<A*>(call_.saved.scale)[slot] = row.scale;
      static_cast<A*>(call_.saved.slope)[slot] = row.slope;
      if (call_.scope == RankScope::token && !call_.given) rank_row(i, slot, scratch);
    }
  }

  void weigh(WeightedRow<T>& weighted, const RowStatistics<A>& row, int64_t slot) const {
    const A log_scale = rows_.log_scale ? static_cast<const A*>(rows_.log_scale)[slot] : A(0);
    weighted.peak = row.peak;
    weighted.factor = A(kLog2E / (rows_.temperatures[0] * double(row.scale)));
    weighted.weight = A(std::exp(double(log_scale - log_total()[slot])));
  }

  // Scope token: a row's probabilities are ordered as its logits are.
  void rank_row(int64_t i, int64_t slot, SelectScratch<A>& scratch) const {
    int64_t* columns = call_.columns + slot * call_.k;
    if (i < 0 || weighted_[i].weight != weighted_[i].weight) {
      columns_in_order(rows_.column_mask, rows_.vocab_size, call_.k, columns);
    } else {
      select_largest(weighted_[i].x, rows_.column_mask, rows_.vocab_size, call_.k, columns, scratch);
    }
  }

  // Rankings one by one, each shared among the threads; or, where there are enough of them, one for each thread.
  void rank(int64_t first_sequence) {
    const int64_t count = int64_t(rankings_.size()), copies = ranks_batch() ? rows_.sequences : 1;
    poisoned_.assign(count * copies, false);
    const Parallel alone = [](int64_t n, int64_t, const auto& body) { body(0, n); };
    const auto rank_one = [&](int64_t i, const Parallel& parallel) {
      Ranking<A>& ranking = rankings_[i];
      for (int64_t j = ranking.first; j < ranking.last; ++j) {
        ranking.poisoned |= weighted_[j].weight != weighted_[j].weight;
      }
      if (ranking.first < ranking.last && !ranking.poisoned) {
        choose_first_tiles(ranking, bounds_.data() + ranking.first * tiles_, tiles_, call_.k);
        make_sums(ranking, 0, parallel);
        const int64_t done = int64_t(ranking.tiles.size());
        choose_further_tiles(ranking, rows_.column_mask, rows_.vocab_size, call_.k);
        make_sums(ranking, done, parallel);
      }
      write_columns(i, first_sequence, copies);
    };
    if (count < call_.threads) {
      for (int64_t i = 0; i < count; ++i) rank_one(i, parallel_);
    } else {
      parallel_(count, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) rank_one(i, alone);
      });
    }
  }

  // The sums of the ranking's tiles from number `done` on.
  void make_sums(Ranking<A>& ranking, int64_t done, const Parallel& parallel) const {
    constexpr int64_t kTiles = 4;  // worth a thread's start
    const int64_t n = int64_t(ranking.tiles.size()) - done;
    parallel(n, kTiles, [&](int64_t from, int64_t to) {
      for (int64_t i = done + from; i < done + to; ++i) {
        tile_sums(weighted_.data() + ranking.first, ranking.last - ranking.first, rows_.vocab_size, ranking.tiles[i],
                  ranking.sums.data() + i * kTile);
      }
    });
  }

  void write_columns(int64_t i, int64_t first_sequence, int64_t copies) {
    const Ranking<A>& ranking = rankings_[i];
    int64_t* columns = call_.columns + (first_sequence + i) * call_.k;
    bool nan = false;
    if (ranking.tiles.empty()) {
      columns_in_order(rows_.column_mask, rows_.vocab_size, call_.k, columns);
      nan = ranking.poisoned && (!rows_.column_mask || rows_.column_mask[columns[0]]);
    } else {
      nan = ranked_columns(ranking, rows_.column_mask, rows_.vocab_size, call_.k, columns);
    }
    for (int64_t copy = 0; copy < copies; ++copy) {
      poisoned_[i + copy] = nan;
      if (copy) std::copy_n(columns, call_.k, columns + copy * call_.k);
    }
  }

  // Log-probabilities of one row at its columns, and their mass.
  void gather(int64_t slot, bool poisoned) const {
    const int64_t i = call_.k * slot;
    A mass = 0;
    for (int64_t r = 0; r < rows_.temperature_count; ++r) {
      A* out = static_cast<A*>(call_.log_probabilities) + r * slots_ * call_.k + i;
      if (rows_.index[slot] < 0) {
        std::fill_n(out, call_.k, A(0));
        continue;
      }
      const int64_t* columns = call_.columns + (call_.scope == RankScope::token ? i : slot / rows_.slots * call_.k);
      const A peak = static_cast<const A*>(call_.saved.peak)[slot];
      const A scaled = A(rows_.temperatures[r]) * static_cast<const A*>(call_.saved.scale)[slot];
      const A log_scale = rows_.log_scale ? static_cast<const A*>(rows_.log_scale)[slot] : A(0);
      const T* x = row_of<T>(rows_, slot);
      for (int64_t j = 0; j < call_.k; ++j) {
        A log_p = log_probability<T>(rows_, x, columns[j], peak, scaled, log_total()[r * slots_ + slot], log_scale);
        if (poisoned) log_p = NAN;
        out[j] = log_p;
        if (r == 0) mass += std::exp(log_p);
      }
    }
    static_cast<A*>(call_.kept_mass)[slot] = mass;
  }

  const RankTruncateForward& call_;
  const LogitsRows& rows_;
  const Parallel& parallel_;
  const int64_t slots_, tiles_;
  std::vector<TemperaturePair> pairs_;
  std::vector<WeightedRow<T>> weighted_;  // the group's counted rows
  std::vector<int64_t> ordinal_;          // where a slot of the group is among them, or -1
  std::vector<A> bounds_;                 // [counted rows, tiles]
  std::vector<Ranking<A>> rankings_;
  std::vector<char> poisoned_;  // by sequence of the group
};

template <class T>
void forward(const RankTruncateForward& call, const Parallel& parallel) {
  Forward<T>(call, parallel).run();
}

template <class T>
void backward(const RankTruncateBackward& call, const Parallel& parallel) {
  using A = Accumulator<T>;
  const LogitsRows& rows = call.rows;
  const int64_t slots = rows.all_slots();
  gradient_of_rows<T>(rows, call.saved, call.grad_values, call.grad_log_scale, parallel, [&](int64_t slot) {
    return GradientOfRow<A>{
        .log_p = static_cast<const A*>(call.grad_log_probabilities) + slot * call.k,
        .log_p_stride = slots * call.k,
        .kept = static_cast<const A*>(call.log_probabilities) + slot * call.k,
        .mass = static_cast<const A*>(call.grad_kept_mass)[slot],
        .lse = 0,
        .columns = call.columns + (call.columns_of_each_row ? slot : slot / rows.slots) * call.k,
        .k = call.k,
    };
  });
}

}  // namespace

extern const RankTruncate rank_truncate = {{forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
                                           {backward<float>, backward<bfloat16>, backward<float16>, backward<double>}};

}  // namespace mlot::MLOT_ISA
