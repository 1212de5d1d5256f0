// The k largest of a row of floats, exactly as a stable descending sort has them: NaN first, the lower column first
// among equals, -0 equal to 0, columns that a mask leaves out last.
//
// Columns are split into groups and only each group's maximum is kept, at the cost of reading the row. At least k
// elements are no smaller than the k-th largest maximum: it is a threshold that few elements but the k largest pass.
// Those are collected from the cache and sorted. `select_largest` does it all; a kernel that reads the row for other
// ends, too, keeps the maxima on its way and calls `select_from_maxima`.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "mlot/cpu/vector.h"

namespace mlot::MLOT_ISA {

// An integer per element type whose order is the order of a descending sort: sort_key(x) > sort_key(y) exactly where x
// comes before y whatever their columns, and equal where their columns decide.
static inline int32_t sort_key(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x + 0.f);  // the sum of -0 and 0 is 0
  const int32_t key = bits ^ int32_t(uint32_t(bits >> 31) >> 1);
  return x != x ? INT32_MAX : key;
}

static inline int64_t sort_key(double x) {
  const int64_t bits = std::bit_cast<int64_t>(x + 0.);
  const int64_t key = bits ^ int64_t(uint64_t(bits >> 63) >> 1);
  return x != x ? INT64_MAX : key;
}

template <class A>
using SortKey = decltype(sort_key(A()));

// The key of a column that the mask leaves out: below the key of -inf.
template <class A>
constexpr SortKey<A> kLeftOut = std::numeric_limits<SortKey<A>>::min();

// A key above the complement of its column: these in descending order are the stable order. Columns are below 2^32.
template <class A>
using Candidate = std::conditional_t<std::is_same_v<A, double>, unsigned __int128, uint64_t>;

template <class A>
static inline Candidate<A> candidate(SortKey<A> key, int64_t column) {
  using Unsigned = std::make_unsigned_t<SortKey<A>>;
  const Unsigned raised = Unsigned(key) ^ Unsigned(kLeftOut<A>);
  return Candidate<A>(raised) << 32 | uint32_t(~column);
}

template <class C>
static inline int64_t column_of(C candidate) {
  return int64_t(uint32_t(~uint32_t(candidate)));
}

// How many neighbouring columns have one maximum: long groups to be quick, yet enough of them that little but the k
// largest passes the threshold. 0: k is so large a part of the n columns that maxima would be of no use.
constexpr int64_t kGroup = 64, kShortGroup = 32;

static inline int64_t group_of(int64_t n, int64_t k) {
  const auto enough = [=](int64_t group) { return 8 * (n / group) >= 9 * k; };
  return enough(kGroup) ? kGroup : enough(kShortGroup) ? kShortGroup : 0;
}

static inline int64_t groups_of(int64_t n, int64_t group) { return (n + group - 1) / group; }

// Memory that calls share; it grows to what the largest one needs.
template <class A>
struct SelectScratch {
  std::vector<A> maxima;  // of groups
  std::vector<A> folded;  // of several groups each
  std::vector<SortKey<A>> keys;
  std::vector<int32_t> reached;  // the groups that reach the threshold
  std::vector<Candidate<A>> candidates, sorted;

  A* maxima_of(int64_t groups) {
    if (int64_t(maxima.size()) < groups) maxima.resize(groups);
    return maxima.data();
  }
};

// The maxima of a row's groups, over the columns that are looked at. NaN is passed over; returns whether there is any.
template <int64_t Group, class T, class A = Accumulator<T>>
static inline bool group_maxima(const T* x, const bool* mask, int64_t n, A* maxima) {
  auto nan = all(A(0)) != all(A(0));
  T looked_at[Group];
  for (int64_t start = 0; start < n; start += Group) {
    const T* group = x + start;
    if (mask || start + Group > n) {
      const int64_t count = std::min(Group, n - start);
      for (int64_t j = 0; j < Group; ++j) narrow(-INFINITY, looked_at[j]);
      for (int64_t j = 0; j < count; ++j) {
        if (!mask || mask[start + j]) looked_at[j] = group[j];
      }
      group = looked_at;
    }
    Vector<A> largest_so_far = all(A(-INFINITY));
    for (int64_t j = 0; j < Group; j += 2 * kWidth<A>) {
      const Pair<A> values = load_pair(group + j);
      for (const Vector<A> value : values.part) {
        largest_so_far = larger(value, largest_so_far);
        nan |= value != value;
      }
    }
    maxima[start / Group] = largest<A>(largest_so_far);
  }
  bool any = false;
  for (int l = 0; l < kWidth<A>; ++l) any |= nan[l] != 0;
  return any;
}

// A value that at least k of the maxima reach, close to the k-th largest of them; -inf where there are fewer than k.
template <class A>
static inline A threshold(const A* maxima, int64_t n, int64_t k, SelectScratch<A>& scratch) {
  using Key = SortKey<A>;
  if (n < k) return -INFINITY;
  constexpr int64_t kFewest = 16;
  // Halves are folded onto one another while more than 8 k are left: the maxima of larger groups do as well.
  while (n >= 8 * k && n > kFewest) {
    const int64_t half = (n + 1) / 2;
    if (int64_t(scratch.folded.size()) < half) scratch.folded.resize(half);
    A* folded = scratch.folded.data();
#pragma omp simd
    for (int64_t i = 0; i < n - half; ++i) folded[i] = maxima[i] > maxima[half + i] ? maxima[i] : maxima[half + i];
    if (n % 2) folded[half - 1] = maxima[half - 1];
    maxima = folded, n = half;
  }
  if (int64_t(scratch.keys.size()) < n) scratch.keys.resize(n);
  Key* keys = scratch.keys.data();
  Key low = std::numeric_limits<Key>::max(), high = std::numeric_limits<Key>::min();
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    const Key key = sort_key(maxima[i]);
    keys[i] = key;
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  // At least k keys reach `low`, fewer than k are above `high`. A few too many do no harm.
  const Key enough = Key(k + k / 8);
  while (low < high) {
    using Unsigned = std::make_unsigned_t<Key>;
    const Key middle = Key(Unsigned(low) + (Unsigned(high) - Unsigned(low) + 1) / 2);
    Key reached = 0;
#pragma omp simd reduction(+ : reached)
    for (int64_t i = 0; i < n; ++i) reached += keys[i] >= middle;
    if (reached < Key(k)) {
      high = middle - 1;
    } else {
      low = middle;
      if (reached <= enough) break;
    }
  }
  // The smallest maximum that reaches it: a key has no way back to the value.
  A smallest = INFINITY;
#pragma omp simd reduction(min : smallest)
  for (int64_t i = 0; i < n; ++i) {
    const A value = keys[i] >= low ? maxima[i] : INFINITY;
    smallest = value < smallest ? value : smallest;
  }
  return smallest;
}

// Sorts candidates that stand in the order of their columns among equal keys.
template <class C>
static inline void sort_descending(std::vector<C>& candidates, std::vector<C>& other) {
  constexpr size_t kFew = 256;  // below, comparing beats clearing and summing up counters
  if (candidates.size() <= kFew || sizeof(C) > sizeof(uint64_t)) {
    std::sort(candidates.begin(), candidates.end(), std::greater<C>());
    return;
  }
  // By digits of the key from the last to the first; each pass keeps the order of equals.
  constexpr int kDigits = 3, kBits = 11;
  constexpr uint32_t kBins = 1u << kBits;
  uint32_t counts[kDigits][kBins] = {};
  const auto digit = [](C c, int d) { return uint32_t(~uint32_t(c >> 32)) >> (d * kBits) & (kBins - 1); };
  for (C c : candidates) {
    for (int d = 0; d < kDigits; ++d) ++counts[d][digit(c, d)];
  }
  other.resize(candidates.size());
  for (int d = 0; d < kDigits; ++d) {
    uint32_t start = 0;
    for (uint32_t& count : counts[d]) start += std::exchange(count, start);
    for (C c : candidates) other[counts[d][digit(c, d)]++] = c;
    candidates.swap(other);
  }
}

// Collects what passes a threshold. Little-endian: the first of eight flags is the lowest byte of their word. Never
// holds more than a few times k candidates: when they are too many, the k largest stay, and the smallest of these is
// the threshold from there on.
template <class A>
class Collector {
 public:
  Collector(A threshold, int64_t k, SelectScratch<A>& scratch)
      : threshold_(threshold), k_(size_t(k)), most_(4 * size_t(k) + 1024), scratch_(scratch) {
    scratch_.candidates.clear();
  }

  // Columns [start, start + count) of a row; calls come in the order of columns.
  template <class T>
  void collect(const T* row, const bool* mask, int64_t start, int64_t count) {
    constexpr int64_t kStep = 32;
    int64_t first = start;
    for (; first + kStep <= start + count; first += kStep) {
      for (uint32_t rest = passing<kStep>(row + first); rest; rest &= rest - 1) {
        add(row, mask, first + std::countr_zero(rest));
      }
    }
    for (; first < start + count; ++first) {
      if (!(A(wide(row[first])) < threshold_)) add(row, mask, first);
    }
  }

  // The columns that the mask leaves out and that are still wanted, below `n`.
  void add_left_out(const bool* mask, int64_t n) {
    for (int64_t j = 0; j < n && scratch_.candidates.size() < k_; ++j) {
      if (!mask[j]) add(candidate<A>(kLeftOut<A>, j));
    }
  }

  void write(int64_t* columns) {
    sort_descending(scratch_.candidates, scratch_.sorted);
    for (size_t i = 0; i < k_; ++i) columns[i] = column_of(scratch_.candidates[i]);
  }

 private:
  // A bit for each of `Count` elements that reach the threshold. NaN does.
  template <int64_t Count, class T>
  uint32_t passing(const T* x) const {
    alignas(8) uint8_t flags[Count];
#pragma omp simd
    for (int64_t j = 0; j < Count; ++j) flags[j] = !(A(wide(x[j])) < threshold_);
    uint32_t bits = 0;
    for (int64_t j = 0; j < Count; j += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, flags + j, 8);
      bits |= uint32_t(eight * 0x0102040810204080 >> 56) << j;  // the first of eight bytes, 0 or 1, is the lowest bit
    }
    return bits;
  }

  template <class T>
  void add(const T* row, const bool* mask, int64_t column) {
    if (!mask || mask[column]) add(candidate<A>(sort_key(A(wide(row[column]))), column));
  }

  void add(Candidate<A> c) {
    if (c <= smallest_) return;
    scratch_.candidates.push_back(c);
    if (scratch_.candidates.size() < most_) return;
    sort_descending(scratch_.candidates, scratch_.sorted);
    scratch_.candidates.resize(k_);
    smallest_ = scratch_.candidates.back();
  }

  const A threshold_;
  const size_t k_, most_;
  Candidate<A> smallest_ = 0;  // no candidate is as small: a column's complement would have to be 0
  SelectScratch<A>& scratch_;
};

// The columns of the k largest of `row`, from the maxima of its groups (group_of(n, k) is not 0).
//
// Args:
//   mask: [n], true for the columns that are looked at, or null for all; the maxima are theirs.
//   nan: the maxima do not say where NaN is, and there may be some.
//   columns: [k], written.
template <class T, class A = Accumulator<T>>
static inline void select_from_maxima(const T* row, const bool* mask, int64_t n, int64_t k, int64_t group,
                                      const A* maxima, bool nan, int64_t* columns, SelectScratch<A>& scratch) {
  const int64_t groups = groups_of(n, group);
  const A least = threshold(maxima, groups, k, scratch);
  Collector<A> collector(least, k, scratch);
  if (int64_t(scratch.reached.size()) < groups) scratch.reached.resize(groups);
  int32_t* const reached = scratch.reached.data();
  int64_t count = 0;
  const A bound = nan ? -INFINITY : least;
  for (int64_t i = 0; i < groups; ++i) {  // without a branch that nobody could predict
    reached[count] = int32_t(i);
    count += maxima[i] >= bound;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = reached[i] * group;
    collector.collect(row, mask, start, std::min(group, n - start));
  }
  if (mask) collector.add_left_out(mask, n);
  collector.write(columns);
}

// The columns of the k largest of `row` [n], 1 <= k <= n, in the order of a stable descending sort.
//
// Args:
//   mask: [n], true for the columns that are looked at, or null for all. The others come last, in their order.
//   columns: [k], written.
template <class T, class A = Accumulator<T>>
static inline void select_largest(const T* row, const bool* mask, int64_t n, int64_t k, int64_t* columns,
                                  SelectScratch<A>& scratch) {
  const int64_t group = group_of(n, k);
  if (group == 0) {
    Collector<A> collector(-INFINITY, k, scratch);
    collector.collect(row, mask, 0, n);
    if (mask) collector.add_left_out(mask, n);
    collector.write(columns);
    return;
  }
  A* maxima = scratch.maxima_of(groups_of(n, group));
  const bool nan =
      group == kGroup ? group_maxima<kGroup>(row, mask, n, maxima) : group_maxima<kShortGroup>(row, mask, n, maxima);
  select_from_maxima(row, mask, n, k, group, maxima, nan, columns, scratch);
}

}  // namespace mlot::MLOT_ISA
