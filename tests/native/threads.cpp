// The torch-free kernels from several std::threads, for the thread sanitizer: it reports libgomp, which torch uses, and
// which is not instrumented. Each kernel must give the same bits on one thread as on several.
#include <cstdio>
#include <initializer_list>
#include <random>
#include <thread>
#include <vector>

#include "mlot/cpu/dispatch.h"
#include "mlot/cpu/rank_truncate.h"
#include "mlot/cpu/row_entropy.h"
#include "mlot/cpu/topk_softmax.h"

namespace {

constexpr int64_t kSequences = 2, kPositions = 32, kSlots = kSequences * kPositions, kColumns = 5003, kKept = 7;

// Shares work among `threads` threads.
mlot::Parallel among(int threads) {
  return [threads](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] { body(t * n / threads, (t + 1) * n / threads); });
    }
    for (auto& thread : pool) thread.join();
  };
}

// What a call writes, forward and backward.
struct Run {
  std::vector<std::vector<float>> floats;
  std::vector<int64_t> columns;

  explicit Run(int64_t kept_columns) : columns(kept_columns) { floats.reserve(16); }

  float* fresh(int64_t count) { return floats.emplace_back(count).data(); }
  mlot::SavedScalars<void*> scalars() {
    return {fresh(kSlots), fresh(kSlots), fresh(kSlots), fresh(kSlots), fresh(kSlots), fresh(kSlots)};
  }
  bool operator==(const Run&) const = default;
};

mlot::SavedScalars<const void*> saved(const mlot::SavedScalars<void*>& made) {
  return {made.log_total, made.expected, made.peak, made.mean, made.scale, made.slope};
}

Run row_entropy(const mlot::LogitsRows& rows, const float* upstream, const mlot::Parallel& parallel) {
  const mlot::RowEntropy& kernels = MLOT_SELECT(row_entropy);
  Run run(0);
  float* s[8];
  for (float*& scalars : s) scalars = run.fresh(kSlots);
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
  Run run(kSlots * kKept);
  const mlot::TopkSoftmaxForward call{
      rows, kKept, run.fresh(kSlots * kKept), run.columns.data(), run.fresh(kSlots), run.scalars()};
  kernels.forward[0](call, parallel);
  kernels.backward[0]({rows, kKept, upstream, upstream, run.columns.data(), saved(call.saved),
                       run.fresh(kSlots * kColumns), run.fresh(kSlots)},
                      parallel);
  return run;
}

Run rank_truncate(const mlot::LogitsRows& rows, const float* upstream, const mlot::Parallel& parallel) {
  const mlot::RankTruncate& kernels = MLOT_SELECT(rank_truncate);
  Run run(kSequences * kKept);
  const mlot::RankTruncateForward call{rows,
                                       nullptr,
                                       kKept,
                                       mlot::RankScope::sequence,
                                       3,
                                       run.fresh(kSlots * kKept),
                                       run.columns.data(),
                                       run.fresh(kSlots),
                                       run.scalars()};
  kernels.forward[0](call, parallel);
  kernels.backward[0]({rows, upstream, upstream, run.columns.data(), false, kKept, call.log_probabilities,
                       saved(call.saved), run.fresh(kSlots * kColumns), run.fresh(kSlots)},
                      parallel);
  return run;
}

}  // namespace

int main() {
  std::vector<float> values(kSlots * kColumns), upstream(kSlots * kKept);
  std::vector<int64_t> index(kSlots);
  std::mt19937 random(0);
  for (float& value : values) value = float(random() % 2000) / 100 - 10;
  for (float& value : upstream) value = float(random() % 2000) / 1000 - 1;
  for (int64_t i = 0; i < kSlots; ++i) index[i] = i % kPositions < kPositions - 3 ? i % kPositions : -1;
  const double temperature = 1;
  const mlot::LogitsRows rows{.values = values.data(),
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
  const struct {
    const char* name;
    Run (*run)(const mlot::LogitsRows&, const float*, const mlot::Parallel&);
  } kernels[] = {{"row_entropy", row_entropy}, {"topk_softmax", topk_softmax}, {"rank_truncate", rank_truncate}};
  for (const auto& kernel : kernels) {
    const Run alone = kernel.run(rows, upstream.data(), among(1));
    for (int threads : {2, 3}) {
      if (!(kernel.run(rows, upstream.data(), among(threads)) == alone)) {
        std::printf("%s: %d threads differ from one\n", kernel.name, threads);
        return 1;
      }
    }
  }
  std::puts("ok");
}
