// What the checks of threads share: threads that the sanitizer sees, and what a kernel writes, as bytes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "mlot/cpu/logits.h"

// Shares work among `threads` threads.
inline mlot::Parallel among(int64_t threads) {
  return [threads](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> pool;
    for (int64_t t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] { body(t * n / threads, (t + 1) * n / threads); });
    }
    for (auto& thread : pool) thread.join();
  };
}

// All that the kernels of a run write, forward and backward.
class Run {
 public:
  template <class T = float>
  T* fresh(int64_t count) {
    return reinterpret_cast<T*>(written_.emplace_back(size_t(count) * sizeof(T)).data());
  }

  bool operator==(const Run&) const = default;

 private:
  std::vector<std::vector<char>> written_;
};

// Whether run(threads) writes the same bits on several threads as on one; says so where it does not.
inline bool same_on_several(const char* name, const std::function<Run(int64_t threads)>& run) {
  const Run alone = run(1);
  for (int64_t threads : {2, 3}) {
    if (run(threads) == alone) continue;
    std::printf("%s: %d threads differ from one\n", name, int(threads));
    return false;
  }
  return true;
}

// Numbers from `low` to `high`, 2000 different ones: long rows have ties.
inline std::vector<float> random_values(int64_t count, float low, float high, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = low + (high - low) * float(random() % 2000) / 2000;
  return values;
}

bool rows_are_the_same();
bool pairs_are_the_same();
