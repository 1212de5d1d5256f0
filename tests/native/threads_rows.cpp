// The kernels over rows of logits.
#include <bit>

#include "mlot/cpu/dispatch.h"
#include "mlot/cpu/match_columns.h"
#include "mlot/cpu/rank_truncate.h"
#include "mlot/cpu/row_entropy.h"
#include "mlot/cpu/sorted_l1.h"
#include "mlot/cpu/token_log_probability.h"
#include "mlot/cpu/topk_softmax.h"
#include "threads.h"

namespace {

constexpr int64_t kSequences = 2, kPositions = 32, kSlots = kSequences * kPositions, kColumns = 5003, kKept = 7;

// Logits [kSequences, kPositions, kColumns], of float or as the bits of bfloat16.
template <class T>
struct Side {
  std::vector<T> values;
  std::vector<int64_t> index;
  double temperature = 1;
  mlot::LogitsRows rows;

  explicit Side(unsigned seed) : values(kSlots * kColumns), index(kSlots) {
    const std::vector<float> drawn = random_values(kSlots * kColumns, -10, 10, seed);
    for (size_t i = 0; i < drawn.size(); ++i) {
      if constexpr (sizeof(T) == 2) {
        values[i] = T(std::bit_cast<uint32_t>(drawn[i]) >> 16);
      } else {
        values[i] = drawn[i];
      }
    }
    for (int64_t i = 0; i < kSlots; ++i) index[i] = i % kPositions < kPositions - 3 ? i % kPositions : -1;
    rows = {.values = values.data(),
            .batch_stride = kPositions * kColumns,
            .row_stride = kColumns,
            .sequences = kSequences,
            .positions = kPositions,
            .width = kColumns,
            .index = index.data(),
            .slots = kPositions,
            .vocab_size = kColumns - 2,
            .column_mask = nullptr,
            .log_scale = nullptr,
            .standardize = true,
            .temperatures = &temperature,
            .temperature_count = 1};
  }

  Side(const Side&) = delete;  // `rows` points into its members
};

mlot::SavedScalars<void*> scalars(Run& run) {
  return {run.fresh(kSlots), run.fresh(kSlots), run.fresh(kSlots),
          run.fresh(kSlots), run.fresh(kSlots), run.fresh(kSlots)};
}

mlot::SavedScalars<const void*> saved(const mlot::SavedScalars<void*>& made) {
  return {made.log_total, made.expected, made.peak, made.mean, made.scale, made.slope};
}

Run row_entropy(const mlot::LogitsRows& rows, const float* upstream, const mlot::Parallel& parallel) {
  const mlot::RowEntropy& kernels = MLOT_SELECT(row_entropy);
  Run run;
  float* s[8];
  for (float*& made : s) made = run.fresh(kSlots);
  kernels.forward[0]({rows, {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]}}, parallel);
  kernels.backward[0]({rows,
                       upstream,
                       {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]},
                       run.fresh(kSlots * kColumns),
                       run.fresh(kSlots)},
                      parallel);
  return run;
}

Run topk_softmax(const mlot::LogitsRows& rows, const float* upstream, const mlot::Parallel& parallel) {
  const mlot::TopkSoftmax& kernels = MLOT_SELECT(topk_softmax);
  Run run;
  const mlot::TopkSoftmaxForward call{
      rows, kKept, run.fresh(kSlots * kKept), run.fresh<int64_t>(kSlots * kKept), run.fresh(kSlots), scalars(run)};
  kernels.forward[0](call, parallel);
  kernels.backward[0]({rows, kKept, upstream, upstream, call.columns, saved(call.saved), run.fresh(kSlots * kColumns),
                       run.fresh(kSlots)},
                      parallel);
  return run;
}

Run rank_truncate(const mlot::LogitsRows& rows, const float* upstream, const mlot::Parallel& parallel) {
  const mlot::RankTruncate& kernels = MLOT_SELECT(rank_truncate);
  Run run;
  const mlot::RankTruncateForward call{rows,
                                       nullptr,
                                       kKept,
                                       mlot::RankScope::sequence,
                                       3,
                                       run.fresh(kSlots * kKept),
                                       run.fresh<int64_t>(kSequences * kKept),
                                       run.fresh(kSlots),
                                       scalars(run)};
  kernels.forward[0](call, parallel);
  kernels.backward[0]({rows, upstream, upstream, call.columns, false, kKept, call.log_probabilities, saved(call.saved),
                       run.fresh(kSlots * kColumns), run.fresh(kSlots)},
                      parallel);
  return run;
}

Run token_log_probability(const mlot::LogitsRows& rows, const float* upstream, const mlot::Parallel& parallel) {
  const mlot::TokenLogProbability& kernels = MLOT_SELECT(token_log_probability);
  Run run;
  int64_t* tokens = run.fresh<int64_t>(kSlots);
  for (int64_t i = 0; i < kSlots; ++i) tokens[i] = i * 67 % rows.vocab_size;
  const mlot::TokenForward call{rows, tokens, run.fresh(kSlots), scalars(run)};
  kernels.forward[0](call, parallel);
  kernels.backward[0]({rows, tokens, upstream, saved(call.saved), run.fresh(kSlots * kColumns), run.fresh(kSlots)},
                      parallel);
  return run;
}

// The choice, and the costs, which have no gradient.
Run match_columns(const mlot::LogitsRows& rows, const float* upstream, const mlot::Parallel& parallel) {
  const mlot::ColumnMatching& kernels = MLOT_SELECT(match_columns);
  Run run;
  float* teacher = run.fresh(kSlots * kKept);
  for (int64_t i = 0; i < kSlots * kKept; ++i) teacher[i] = upstream[i] - 4;
  kernels.run[0][0]({rows, teacher, kKept, run.fresh<int64_t>(kSequences * kKept), nullptr}, parallel);
  kernels.run[0][0]({rows, teacher, kKept, nullptr, run.fresh(kSequences * kKept * rows.vocab_size)}, parallel);
  return run;
}

// Stable ties split logits among several signs, whose rows backward has to order again; their mean leaves steps.
Run sorted_l1(const Side<float>& student, const mlot::LogitsRows& teacher, int dtype, bool mean_over_ties,
              const float* upstream, const mlot::Parallel& parallel) {
  const mlot::SortedL1& kernels = MLOT_SELECT(sorted_l1);
  Run run;
  const auto made = [&]() -> mlot::SortedL1Saved<void*> {
    return {run.fresh(kSlots), run.fresh(kSlots), run.fresh(kSlots), run.fresh(kSlots),
            run.fresh(kSlots), run.fresh(kSlots), run.fresh(kSlots), run.fresh(kSlots * 2 * mlot::kSavedSteps)};
  };
  const auto left = [](const mlot::SortedL1Saved<void*>& s) -> mlot::SortedL1Saved<const void*> {
    return {s.peak, s.log_total, s.mean, s.scale, s.slope, s.total, s.moment, s.steps};
  };
  const mlot::SortedL1Options options{mean_over_ties, kColumns, true};
  const mlot::SortedL1Forward call{{student.rows, teacher}, options, run.fresh(kSlots), {made(), made()}};
  kernels.forward[0][dtype](call, parallel);
  kernels.backward[0][dtype]({{student.rows, teacher},
                              options,
                              {upstream, upstream},
                              {left(call.saved[0]), left(call.saved[1])},
                              {run.fresh(kSlots * kColumns), run.fresh(kSlots * kColumns)},
                              {run.fresh(kSlots), run.fresh(kSlots)}},
                             parallel);
  return run;
}

}  // namespace

bool rows_are_the_same() {
  const Side<float> side(0), other(1);
  const Side<uint16_t> half(2);
  const std::vector<float> upstream = random_values(kSlots * kKept, -1, 1, 3);
  const struct {
    const char* name;
    Run (*run)(const mlot::LogitsRows&, const float*, const mlot::Parallel&);
  } kernels[] = {{"row_entropy", row_entropy},
                 {"topk_softmax", topk_softmax},
                 {"rank_truncate", rank_truncate},
                 {"token_log_probability", token_log_probability},
                 {"match_columns", match_columns}};
  bool same = true;
  for (const auto& kernel : kernels) {
    same &= same_on_several(kernel.name,
                            [&](int64_t threads) { return kernel.run(side.rows, upstream.data(), among(threads)); });
  }
  for (const bool mean_over_ties : {false, true}) {
    same &= same_on_several("sorted_l1", [&](int64_t threads) {
      return sorted_l1(side, other.rows, 0, mean_over_ties, upstream.data(), among(threads));
    });
    same &= same_on_several("sorted_l1, teacher of bfloat16", [&](int64_t threads) {
      return sorted_l1(side, half.rows, 1, mean_over_ties, upstream.data(), among(threads));
    });
  }
  return same;
}
