// Sums that parts of the work make by themselves, added in the order of the parts: the same bits whether one thread
// makes them all or several do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "mlot/cpu/scalar.h"

namespace mlot::MLOT_ISA {

template <class A>
class PartSums {
 public:
  // Begins anew with `parts` parts of `size` sums each; 0: there is nothing to sum. Parts that are made at the same
  // time are kept until all are there. Others are made one after the other, in order, and share one's memory.
  void start(int64_t parts, int64_t size, bool at_the_same_time) {
    kept_ = at_the_same_time ? parts : 0;
    parts_.resize(std::max(parts_.size(), size_t(std::max(kept_, int64_t(1)))));
    total_.assign(size_t(size), A(0));
  }

  // Zeros, to which the part's sums are added; null where there is nothing to sum.
  A* begin(int64_t part) {
    if (total_.empty()) return nullptr;
    std::vector<A>& sums = parts_[kept_ > 0 ? part : 0];
    sums.assign(total_.size(), A(0));
    return sums.data();
  }

  // The part that began last in this thread is made.
  void end() {
    if (kept_ == 0) add(0);
  }

  // Once, when all parts are made.
  const A* total() {
    for (int64_t part = 0; part < kept_; ++part) add(part);
    return total_.data();
  }

 private:
  void add(int64_t part) {
    for (size_t i = 0; i < total_.size(); ++i) total_[i] += parts_[part][i];
  }

  int64_t kept_ = 0;
  std::vector<std::vector<A>> parts_;
  std::vector<A> total_;
};

}  // namespace mlot::MLOT_ISA
