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

// Calls body(first, last) over shares of the rows, one a thread.
template <class Body>
void share(int threads, const Body& body) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] { body(t * kRows / threads, (t + 1) * kRows / threads); });
  }
  for (auto& thread : pool) thread.join();
}

Run row_entropy(const mlot::LogitsView& logits, int threads) {
  const mlot::RowEntropyKernels& kernels = MLOT_SELECT(row_entropy);
  Run run;
  auto& s = run.scalars;
  const mlot::RowEntropyOutputs outputs{s[0].data(), s[1].data(), s[2].data(), s[3].data(),
                                        s[4].data(), s[5].data(), s[6].data(), s[7].data()};
  const std::vector<float> grad(kRows, 1);
  share(threads, [&](int64_t first, int64_t last) { kernels.forward[0](logits, outputs, first, last); });
  share(threads, [&](int64_t first, int64_t last) {
    kernels.backward[0](logits, outputs, grad.data(), run.gradient.data(), kRows, kColumns, run.grad_log_scale.data(),
                        first, last);
  });
  return run;
}

}  // namespace

int main() {
  std::vector<float> values(kRows * kColumns);
  std::vector<int64_t> index(kRows);
  std::mt19937 random(0);
  for (float& value : values) value = float(random() % 2000) / 100 - 10;
  for (int64_t i = 0; i < kRows; ++i) index[i] = i;
  mlot::LogitsView logits{values.data(), kRows * kColumns, kColumns, index.data(), kRows, kColumns,
                          nullptr,       nullptr,          1,        true};
  const Run alone = row_entropy(logits, 1);
  for (int threads : {2, 3}) {
    if (!(row_entropy(logits, threads) == alone)) {
      std::printf("row_entropy: %d threads differ from one\n", threads);
      return 1;
    }
  }
  std::puts("ok");
}
