// Rows in descending order as runs of equal logits, and the comparison of two of them rank by rank.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "mlot/cpu/select.h"
#include "mlot/cpu/vector.h"

namespace mlot::MLOT_ISA {

// Grows without writing to what it gets.
template <class T>
struct UninitializedAllocator : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = UninitializedAllocator<U>;
  };
  void construct(T*) {}
  template <class... Arguments>
  void construct(T* place, Arguments&&... arguments) {
    ::new (place) T(std::forward<Arguments>(arguments)...);
  }
};
template <class T>
using Room = std::vector<T, UninitializedAllocator<T>>;

// Distinct logits of one row in descending order, without -inf, their probabilities and how often each is there.
template <class A>
struct Runs {
  Room<A> x, p;
  Room<uint32_t> count;

  int64_t size() const { return int64_t(x.size()); }

  void clear() { x.clear(), p.clear(), count.clear(); }
};

// 2^((x - peak) factor) * weight of n logits.
template <class A>
static inline void probabilities(const A* x, int64_t n, A peak, A factor, A weight, A* p) {
  for (int64_t i = 0; i < n; i += kWidth<A>) {
    Vector<A> v = all(peak);
    const int64_t m = std::min(int64_t(kWidth<A>), n - i);
    __builtin_memcpy(&v, x + i, m * sizeof(A));
    v = exp2_negative<A>(at_least_smallest<A>((v - peak) * factor)) * weight;
    __builtin_memcpy(p + i, &v, m * sizeof(A));
  }
}

// Ascending, by digits from the last to the first; digits that all keys share are passed over.
template <class Key>
static inline void sort_ascending(Room<Key>& keys, Room<Key>& other) {
  constexpr size_t kFew = 512;  // below, comparing beats clearing and summing up counters
  if (keys.size() <= kFew) {
    std::sort(keys.begin(), keys.end());
    return;
  }
  constexpr int kBits = 11, kDigits = (int(sizeof(Key)) * 8 + kBits - 1) / kBits;
  constexpr uint32_t kDigit = (1u << kBits) - 1;
  uint32_t counts[kDigits][kDigit + 1] = {};
  for (const Key key : keys) {
    for (int d = 0; d < kDigits; ++d) ++counts[d][uint32_t(key >> (d * kBits)) & kDigit];
  }
  other.resize(keys.size());
  for (int d = 0; d < kDigits; ++d) {
    const auto digit = [d](Key key) { return uint32_t(key >> (d * kBits)) & kDigit; };
    if (counts[d][digit(keys[0])] == keys.size()) continue;
    uint32_t start = 0;
    for (uint32_t& count : counts[d]) start += std::exchange(count, start);
    for (const Key key : keys) other[counts[d][digit(key)]++] = key;
    keys.swap(other);
  }
}

// The sort key of a logit and its way back; -0 becomes 0.
template <class A>
using UnsignedKey = std::make_unsigned_t<SortKey<A>>;

// Unsigned, and the larger the smaller the logit.
template <class A>
static inline UnsignedKey<A> descending_key(A x) {
  return ~(UnsignedKey<A>(sort_key(x)) ^ UnsignedKey<A>(kLeftOut<A>));
}

template <class A>
static inline A value_of(SortKey<A> key) {
  constexpr int kSign = 8 * int(sizeof(A)) - 1;
  return std::bit_cast<A>(key ^ SortKey<A>(UnsignedKey<A>(key >> kSign) >> 1));
}

// The next larger number.
template <class A>
static inline A value_above(A x) {
  return value_of<A>(sort_key(x) + 1);
}

template <class A>
static inline A value_of_descending(UnsignedKey<A> key) {
  return value_of<A>(SortKey<A>(~key ^ UnsignedKey<A>(kLeftOut<A>)));
}

template <class A>
MLOT_INLINE Vector<A> values_of_descending(const UnsignedKey<A>* keys) {
  VectorBits<A> bits;
  __builtin_memcpy(&bits, keys, sizeof(bits));
  bits = ~bits ^ VectorBits<A>{} ^ UnsignedKey<A>(kLeftOut<A>);
  const VectorBits<A> negative = VectorBits<A>(bits > ~UnsignedKey<A>{} / 2);
  return std::bit_cast<Vector<A>>(bits ^ negative >> 1);
}

// Of no NaN.
template <class A>
static inline void descending_keys(const A* x, int64_t n, UnsignedKey<A>* keys) {
  constexpr UnsignedKey<A> kSign = UnsignedKey<A>(kLeftOut<A>);
  int64_t i = 0;
  for (; i + kWidth<A> <= n; i += kWidth<A>) {
    const auto bits = std::bit_cast<VectorBits<A>>(load(x + i) + A(0));
    const VectorBits<A> negative = VectorBits<A>(bits >= kSign);
    const VectorBits<A> own = ~(bits ^ (negative >> 1) ^ kSign);
    __builtin_memcpy(keys + i, &own, sizeof(own));
  }
  for (; i < n; ++i) keys[i] = descending_key(x[i]);
}

// Whether each of kWidth keys differs from the one behind it.
template <class A>
MLOT_INLINE bool all_differ(const UnsignedKey<A>* keys) {
  VectorBits<A> own, next;
  __builtin_memcpy(&own, keys, sizeof(own));
  __builtin_memcpy(&next, keys + 1, sizeof(next));
  return !any<A>(VectorBits<A>(own == next));
}

// Counts keys of which few are distinct, for which sorting would be slow: it waits for the same counters. Returns false
// where there are more than kFewKeys of them. `distinct` gets them in ascending order, `times` how often each is there.
template <class Key>
static inline bool count_few_keys(const Room<Key>& keys, Room<Key>& distinct, Room<uint32_t>& times) {
  constexpr size_t kFewKeys = 1024, kSlots = 4096;
  struct Slot {
    Key key;
    uint32_t times;
  };
  if (keys.size() < 2 * kSlots) return false;
  std::vector<Slot> slots(kSlots);
  distinct.clear(), times.clear();
  const auto slot_of = [&](Key key) -> Slot& {
    size_t i = uint32_t(key ^ key >> (4 * sizeof(Key))) * 0x9e3779b1u >> 20;
    while (slots[i].times > 0 && slots[i].key != key) i = (i + 1) % kSlots;
    return slots[i];
  };
  for (const Key key : keys) {
    Slot& slot = slot_of(key);
    if (slot.times++ > 0) continue;
    slot.key = key;
    distinct.push_back(key);
    if (distinct.size() > kFewKeys) return false;
  }
  std::sort(distinct.begin(), distinct.end());
  for (const Key key : distinct) times.push_back(slot_of(key).times);
  return true;
}

// Runs of logits; `keys` and `other` are room.
template <class A>
static inline void runs_of(const Room<A>& x, Room<UnsignedKey<A>>& keys, Room<UnsignedKey<A>>& other, Runs<A>& runs) {
  keys.resize(x.size());
  descending_keys(x.data(), int64_t(x.size()), keys.data());
  if (count_few_keys(keys, other, runs.count)) {
    runs.x.resize(other.size());
    for (size_t i = 0; i < other.size(); ++i) runs.x[i] = value_of_descending<A>(other[i]);
    return;
  }
  sort_ascending(keys, other);
  runs.x.resize(keys.size());
  runs.count.resize(keys.size());
  const size_t n = keys.size();
  size_t made = 0;
  for (size_t i = 0; i < n; ++made) {
    while (i + kWidth<A> < n && all_differ<A>(&keys[i])) {  // runs of one element each
      store(values_of_descending<A>(&keys[i]), &runs.x[made]);
      std::fill_n(&runs.count[made], kWidth<A>, 1);
      made += kWidth<A>, i += kWidth<A>;
    }
    size_t end = i + 1;
    while (end < n && keys[end] == keys[i]) ++end;
    runs.x[made] = value_of_descending<A>(keys[i]);
    runs.count[made] = uint32_t(end - i);
    i = end;
  }
  runs.x.resize(made);
  runs.count.resize(made);
}

// What the sign of p_(i) - q_(i) is beyond rank top_k, before the sums there are known.
constexpr int32_t kTail = 2;

// Neighbouring ranks of one side whose signs of p_(i) - q_(i) are equal: those of runs [run, last), or of a part of
// one.
struct Piece {
  uint32_t run, last, ranks;
  int32_t sign;  // -1, 0, 1 or kTail
};

// Some runs of a side, [first, last); `rank` is that of the first one's first element.
struct RankedRuns {
  int64_t first, last, rank;
};

// Walks down a side's ranks and leaves the pieces.
template <class A>
class RankWalk {
 public:
  RankWalk(const Runs<A>& runs, RankedRuns range, int64_t top_k, std::vector<Piece>& pieces)
      : runs_(runs),
        run_(range.first),
        last_(range.last),
        rank_(range.rank),
        top_k_(top_k),
        pieces_(pieces),
        before_(pieces.size()) {
    if (more()) left_ = runs_.count[run_];
  }

  bool more() const { return run_ < last_; }
  int64_t rank() const { return rank_; }
  int64_t left() const { return left_; }  // of the run
  A p() const { return runs_.p[run_]; }

  // The runs from here on.
  const A* p_ahead() const { return runs_.p.data() + run_; }
  const uint32_t* counts_ahead() const { return runs_.count.data() + run_; }
  // How many of them, if each is one element, are on this side of top_k; 0 inside a run.
  int64_t runs_ahead() const {
    if (left_ != runs_.count[run_]) return 0;
    return rank_ < top_k_ ? std::min(last_ - run_, top_k_ - rank_) : last_ - run_;
  }

  // Goes n <= left() ranks on.
  void take(int64_t n, int32_t sign) {
    const int64_t head = std::clamp(top_k_ - rank_, int64_t(0), n);
    if (head > 0) push({uint32_t(run_), uint32_t(run_ + 1), uint32_t(head), sign});
    if (n > head) push({uint32_t(run_), uint32_t(run_ + 1), uint32_t(n - head), kTail});
    rank_ += n;
    left_ -= n;
    if (left_ == 0 && ++run_ < last_) left_ = runs_.count[run_];
  }

  // Goes on by n <= runs_ahead() runs of one element each.
  void take_runs(int64_t n, int32_t sign) {
    push({uint32_t(run_), uint32_t(run_ + n), uint32_t(n), rank_ < top_k_ ? sign : kTail});
    rank_ += n;
    run_ += n;
    if (more()) left_ = runs_.count[run_];
  }

 private:
  // Joins a piece to the one before where they are neighbours of one sign.
  void push(Piece piece) {
    if (pieces_.size() > before_ && pieces_.back().sign == piece.sign) {
      Piece& back = pieces_.back();
      const bool same_run = back.last == piece.last, next_run = back.last == piece.run;
      if (same_run || (next_run && whole(back) && whole(piece))) {
        back.last = piece.last;
        back.ranks += piece.ranks;
        return;
      }
    }
    pieces_.push_back(piece);
  }

  bool whole(const Piece& piece) const { return piece.last > piece.run + 1 || piece.ranks == runs_.count[piece.run]; }

  const Runs<A>& runs_;
  int64_t run_;
  const int64_t last_;
  int64_t rank_, left_ = 0;
  const int64_t top_k_;
  std::vector<Piece>& pieces_;
  const size_t before_;
};

// How many of the next ranks of two sides, at most `most` and in whole blocks, are runs of one element each with this
// sign of p - q.
template <class A>
static inline int64_t equal_signs(const A* p, const uint32_t* p_count, const A* q, const uint32_t* q_count,
                                  int64_t most, int32_t sign) {
  constexpr int64_t kBlock = 32;
  const VectorBits<A> larger = VectorBits<A>{} - UnsignedKey<A>(sign > 0),
                      smaller = VectorBits<A>{} - UnsignedKey<A>(sign < 0),
                      equal = VectorBits<A>{} - UnsignedKey<A>(sign == 0);
  int64_t n = 0;
  for (; n + kBlock <= most; n += kBlock) {
    VectorBits<A> others = {};
    for (int64_t j = n; j < n + kBlock; j += kWidth<A>) {
      const Vector<A> a = load(p + j), b = load(q + j);
      others |= ~((VectorBits<A>(a > b) & larger) | (VectorBits<A>(a < b) & smaller) | (VectorBits<A>(a == b) & equal));
    }
    uint32_t several = 0;
    for (int64_t j = n; j < n + kBlock; ++j) several |= (p_count[j] ^ 1) | (q_count[j] ^ 1);
    if (several || any<A>(others)) break;
  }
  return n;
}

// Appends the pieces of either side's runs, where runs above are larger than all of these, and runs below smaller.
template <class S, class T>
static inline void compare_runs(const Runs<S>& student, RankedRuns student_range, const Runs<T>& teacher,
                                RankedRuns teacher_range, int64_t top_k, std::vector<Piece>& student_pieces,
                                std::vector<Piece>& teacher_pieces) {
  RankWalk<S> s(student, student_range, top_k, student_pieces);
  RankWalk<T> t(teacher, teacher_range, top_k, teacher_pieces);
  while (s.more() && s.rank() < t.rank()) s.take(std::min(s.left(), t.rank() - s.rank()), -1);  // meet runs above
  while (t.more() && t.rank() < s.rank()) t.take(std::min(t.left(), s.rank() - t.rank()), 1);
  constexpr int64_t kWait = 16;  // ranks before the next look for a long stretch of one sign
  for (int64_t step = 0; s.more() && t.more(); ++step) {
    const int32_t sign = int32_t(s.p() > t.p()) - int32_t(s.p() < t.p());
    if constexpr (std::is_same_v<S, T>) {
      if (step % kWait == 0) {
        const int64_t n = equal_signs(s.p_ahead(), s.counts_ahead(), t.p_ahead(), t.counts_ahead(),
                                      std::min(s.runs_ahead(), t.runs_ahead()), sign);
        if (n > 0) {
          s.take_runs(n, sign), t.take_runs(n, sign);
          --step;
          continue;
        }
      }
    }
    const int64_t n = std::min(s.left(), t.left());
    s.take(n, sign);
    t.take(n, sign);
  }
  while (s.more()) s.take(s.left(), 1);  // meet runs below, or nothing
  while (t.more()) t.take(t.left(), -1);
}

}  // namespace mlot::MLOT_ISA
