// The derivative of sorted_l1 by a side's probabilities as a step function of the logit.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "mlot/cpu/run_length.h"
#include "mlot/cpu/sorted_l1.h"

namespace mlot::MLOT_ISA {

// Step i holds the logits below below[i] that are in no later step. Steps of one equal logit that was split among
// several signs, the first columns first, have equal thresholds; their lengths are not 0.
template <class A>
struct Steps {
  std::vector<A> below, sign;
  std::vector<uint32_t> length;
  bool split = false;  // there is such a logit

  int64_t size() const { return int64_t(below.size()); }

  void clear() { below.clear(), sign.clear(), tail_.clear(), length.clear(), split = false; }

  // Logits of one sign that are smaller than all before them; `tail` times the tail's sign, which `finish` adds, is
  // part of it. `threshold` makes what they are below.
  template <class Threshold>
  void add(A own, A tail, const Threshold& threshold) {
    if (size() > 0 && sign.back() == own && tail_.back() == tail && length.back() == 0) return;
    push(own, tail, size() > 0 ? threshold() : A(INFINITY), 0);
  }

  void add_split(A own, A tail, A threshold, uint32_t n) {
    split = true;
    push(own, tail, threshold, n);
  }

  // Every logit has a sign once that of the tail is known.
  void finish(A tail_sign) {
    if (size() == 0) push(0, 0, INFINITY, 0);
    size_t kept = 0;
    for (size_t i = 0; i < below.size(); ++i) {
      const A own = sign[i] + tail_[i] * tail_sign;
      if (kept > 0 && sign[kept - 1] == own && length[kept - 1] == 0 && length[i] == 0) continue;
      below[kept] = below[i], sign[kept] = own, length[kept] = length[i];
      ++kept;
    }
    below.resize(kept), sign.resize(kept), length.resize(kept);
  }

  // As SortedL1Saved has them, [kSavedSteps, 2].
  void save(A* out) const {
    std::fill_n(out, 2 * kSavedSteps, A(0));
    if (split || size() > kSavedSteps) {
      out[0] = -1;
      return;
    }
    for (int64_t i = 0; i < size(); ++i) out[2 * i] = below[i], out[2 * i + 1] = sign[i];
    out[0] = A(size());
  }

  // Whether they were saved.
  bool load(const A* saved) {
    clear();
    if (saved[0] < 0) return false;
    for (int64_t i = 0; i < int64_t(saved[0]); ++i) push(saved[2 * i + 1], 0, i == 0 ? A(INFINITY) : saved[2 * i], 0);
    return true;
  }

 private:
  void push(A own, A tail, A threshold, uint32_t n) {
    below.push_back(threshold), sign.push_back(own), tail_.push_back(tail), length.push_back(n);
  }

  std::vector<A> tail_;
};

// Finds the step of any logit of a row, however many there are.
template <class A>
class StepTable {
 public:
  explicit StepTable(const Steps<A>& steps) : steps_(steps), first_(kBuckets), used_(steps.size()) {
    // A bucket's first step is that of its largest logit, or the one before.
    int64_t bucket = 0;
    for (int64_t i = 1; i < steps.size(); ++i) {
      const int64_t next = bucket_of(steps.below[i]);
      for (; bucket <= next; ++bucket) first_[bucket] = uint32_t(i - 1);
    }
    for (; bucket < kBuckets; ++bucket) first_[bucket] = uint32_t(steps.size() - 1);
  }

  // The sign of the next column, in the order of columns, whose logit is x.
  A next(A x) {
    int64_t i = first_[bucket_of(x)];
    while (i + 1 < steps_.size() && x < steps_.below[i + 1]) ++i;
    if (steps_.length[i] > 0) {
      const int64_t last = i;
      while (i > 0 && steps_.below[i - 1] == steps_.below[last]) --i;
      while (i < last && used_[i] == steps_.length[i]) ++i;
      ++used_[i];
    }
    return steps_.sign[i];
  }

 private:
  static constexpr int64_t kBuckets = 65536;

  static int64_t bucket_of(A x) { return int64_t(descending_key(x) >> (8 * sizeof(A) - 16)); }

  const Steps<A>& steps_;
  std::vector<uint32_t> first_, used_;
};

}  // namespace mlot::MLOT_ISA
