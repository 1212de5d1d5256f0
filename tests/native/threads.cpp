// The torch-free kernels from several std::threads, for the thread sanitizer: it reports libgomp, which torch uses, and
// which is not instrumented.
#include <cstdio>
#include <initializer_list>
#include <random>
#include <thread>
#include <vector>

#include "mlot/cpu/dispatch.h"
#include "mlot/cpu/row_entropy.h"

namespace {

constexpr int64_t kRows = 64, kColumns = 5003;

struct Run {
  std::vector<float> scalars[8], gradient, grad_log_scale;

  Run() : gradient(kRows * kColumns), grad_log_scale(kRows) {
    for (auto& rows : scalars) rows.resize(kRows);
  }

  bool operator==(const Run& other) const { return gradient == other.gradient && scalars[0] == other.scalars[0]; }
};

// Shares the rows among `threads` threads.
mlot::Parallel among(int threads) {
  return [threads](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] { body(t * n / threads, (t + 1) * n / threads); });
    }
    for (auto& thread : pool) thread.join();
  };
}

Run row_entropy(const mlot::LogitsRows& rows, int threads) {
  const mlot::RowEntropy& kernels = MLOT_SELECT(row_entropy);
  Run run;
  auto& s = run.scalars;
  kernels.forward[0]({rows,
                      {s[0].data(), s[1].data(), s[2].data(), s[3].data(), s[4].data(), s[5].data(), s[6].data(),
                       s[7].data()}},
                     among(threads));
  const std::vector<float> grad(kRows, 1);
  kernels.backward[0]({rows,
                       grad.data(),
                       {s[0].data(), s[1].data(), s[2].data(), s[3].data(), s[4].data(), s[5].data(), s[6].data(),
                        s[7].data()},
                       run.gradient.data(),
                       run.grad_log_scale.data()},
                      among(threads));
  return run;
}

}  // namespace

int main() {
  std::vector<float> values(kRows * kColumns);
  std::vector<int64_t> index(kRows);
  std::mt19937 random(0);
  for (float& value : values) value = float(random() % 2000) / 100 - 10;
  for (int64_t i = 0; i < kRows; ++i) index[i] = i;
  const double temperature = 1;
  const mlot::LogitsRows logits{.values = values.data(),
                                .batch_stride = kRows * kColumns,
                                .row_stride = kColumns,
                                .sequences = 1,
                                .positions = kRows,
                                .width = kColumns,
                                .index = index.data(),
                                .slots = kRows,
                                .vocab_size = kColumns,
                                .column_mask = nullptr,
                                .log_scale = nullptr,
                                .standardize = true,
                                .temperatures = &temperature,
                                .temperature_count = 1};
  const Run alone = row_entropy(logits, 1);
  for (int threads : {2, 3}) {
    if (!(row_entropy(logits, threads) == alone)) {
      std::printf("row_entropy: %d threads differ from one\n", threads);
      return 1;
    }
  }
  std::puts("ok");
}
