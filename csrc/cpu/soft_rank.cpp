// soft_rank on a CPU; compiled once per instruction set.
#include "mlot/cpu/soft_rank.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "mlot/cpu/vector.h"

namespace mlot::MLOT_ISA {
namespace {

constexpr int64_t kNarrow = 64;             // entries of a row, up to which every lane of a vector has a row of its own
constexpr int64_t kEntriesATime = 1 << 14;  // of the rows that a thread takes at least

int64_t length_of(const SoftRankForward& call, int64_t row) {
  return call.lengths ? std::clamp(call.lengths[row], int64_t(0), call.width) : call.width;
}

// An entry at its position in descending order.
template <class A>
struct Entry {
  A s;
  int32_t column;
};

// Neighbours that are pooled: `below` sums by how much they are less than the first of them.
struct Block {
  int64_t start, size;
  double below;
};

// What a thread works with.
template <class A>
struct Room {
  std::vector<Entry<A>> entries;
  std::vector<Block> blocks;

  explicit Room(int64_t width) : entries(width), blocks(width) {}
};

// Owns a row whose first `length` entries are in order; where it has a NaN, in any order, with other numbers for it.
// Pools adjacent violators, a step for each entry and for each block that goes, and writes the row's outputs. Sums are
// relative to a block's first entry, which no offset of the row can swallow, and in double.
template <class A>
void rank(const SoftRankForward& call, int64_t row, int64_t length, bool has_nan, Room<A>& room) {
  const int64_t n = call.width;
  const Entry<A>* entries = room.entries.data();
  const double half_epsilon = call.epsilon * 0.5;
  const auto apart = [entries](int64_t i, int64_t j) {  // an infinity is no distance from itself
    return entries[i].s == entries[j].s ? 0.0 : double(entries[i].s) - double(entries[j].s);
  };
  Block *const blocks = room.blocks.data(), *end = blocks;
  for (int64_t i = 0; i < length; ++i) {
    *end++ = {i, 1, 0};
    while (end - blocks > 1) {
      Block &before = end[-2], &last = end[-1];
      const double a = double(before.size), b = double(last.size), drop = apart(before.start, last.start);
      // The blocks' means are so far apart, and their mean ranks (a + b) / 2, both times a b.
      if (drop * a * b + before.below * b - last.below * a >= half_epsilon * (a + b) * a * b) break;
      before.below += last.below - b * drop;
      before.size += last.size;
      --end;
    }
  }
  A* ranks = static_cast<A*>(call.ranks) + row * n;
  int32_t *order = call.order + row * n, *block_of = call.block + row * n;
  for (const Block* block = blocks; block < end; ++block) {
    const double mean = block->below / double(block->size);
    const double of_block = double(length - block->start) - double(block->size - 1) / 2;
    const int64_t noted = has_nan ? n : std::isinf(entries[block->start].s) ? ~block->start : block->start;
    for (int64_t i = block->start; i < block->start + block->size; ++i) {
      const double above = block->size == 1 ? 0.0 : -apart(block->start, i) - mean;
      ranks[entries[i].column] = has_nan ? A(NAN) : A(above / call.epsilon + of_block);
      order[i] = entries[i].column;
      block_of[i] = int32_t(noted);
    }
  }
  for (int64_t i = length; i < n; ++i) {
    ranks[i] = 0;
    order[i] = int32_t(i);
    block_of[i] = int32_t(~i);
  }
}

// Owns a row of any width.
template <class T, class A>
void wide_row(const SoftRankForward& call, int64_t row, Room<A>& room) {
  const int64_t length = length_of(call, row);
  const T* x = static_cast<const T*>(call.values) + row * call.row_stride;
  bool has_nan = false;
  for (int64_t i = 0; i < length; ++i) {
    const A s = wide(x[i]);
    has_nan |= s != s;
    room.entries[i] = {s != s ? A(0) : s, int32_t(i)};
  }
  std::sort(room.entries.begin(), room.entries.begin() + length,
            [](const Entry<A>& a, const Entry<A>& b) { return a.s > b.s || (a.s == b.s && a.column < b.column); });
  rank(call, row, length, has_nan, room);
}

// kWidth rows, one in each lane, by column and then by position.
template <class A>
struct Rows {
  Vector<A> s[kNarrow];
  VectorBits<A> column[kNarrow];
};

// Puts the larger of two entries first; of equals the lower column.
template <class A>
MLOT_INLINE void exchange(Rows<A>& rows, int64_t i, int64_t j) {
  const Vector<A> a = rows.s[i], b = rows.s[j];
  const VectorBits<A> of_a = rows.column[i], of_b = rows.column[j];
  const auto swap = (a < b) | ((a == b) & (of_a > of_b));
  rows.s[i] = swap ? b : a, rows.s[j] = swap ? a : b;
  rows.column[i] = swap ? of_b : of_a, rows.column[j] = swap ? of_a : of_b;
}

// Batcher's merge exchange (Knuth's algorithm 5.2.2M): some n log^2 n / 4 exchanges, whatever the values are, and so
// the same ones in every lane.
template <class A>
void sort(int64_t n, Rows<A>& rows) {
  if (n < 2) return;
  int64_t top = 1;
  while (2 * top < n) top *= 2;
  for (int64_t p = top; p > 0; p /= 2) {
    for (int64_t q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (int64_t i = 0; i + d < n; ++i) {
        if ((i & p) == r) exchange(rows, i, i + d);
      }
      if (q == p) break;
    }
  }
}

// Owns the rows [first, first + count), at most kWidth, of at most kNarrow entries. They are sorted side by side, where
// a row alone would be mostly mispredicted branches, and what lies beyond a length, -inf in a later column, stays last.
template <class T, class A>
void narrow_rows(const SoftRankForward& call, int64_t first, int64_t count, Rows<A>& rows, Room<A>& room) {
  const int64_t n = call.width;
  for (int64_t i = 0; i < n; ++i) {
    rows.s[i] = all(A(-INFINITY));
    rows.column[i] = VectorBits<A>{} + uint32_t(i);
  }
  bool has_nan[kWidth<A>] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    const T* x = static_cast<const T*>(call.values) + (first + lane) * call.row_stride;
    const int64_t length = length_of(call, first + lane);
    for (int64_t i = 0; i < length; ++i) {
      const A s = wide(x[i]);
      has_nan[lane] |= s != s;
      rows.s[i][lane] = s != s ? A(0) : s;
    }
  }
  sort(n, rows);
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t i = 0; i < n; ++i) room.entries[i] = {rows.s[i][lane], int32_t(rows.column[i][lane])};
    rank(call, first + lane, length_of(call, first + lane), has_nan[lane], room);
  }
}

template <class T, class A = Accumulator<T>>
void forward(const SoftRankForward& call, const Parallel& parallel) {
  const int64_t grain = std::max(int64_t(1), kEntriesATime / std::max(int64_t(1), call.width));
  if (call.width > kNarrow) {
    parallel(call.rows, grain, [&](int64_t begin, int64_t end) {
      Room<A> room(call.width);
      for (int64_t row = begin; row < end; ++row) wide_row<T>(call, row, room);
    });
    return;
  }
  constexpr int64_t W = kWidth<A>;
  parallel((call.rows + W - 1) / W, (grain + W - 1) / W, [&](int64_t begin, int64_t end) {
    Room<A> room(call.width);
    Rows<A> rows;
    for (int64_t group = begin; group < end; ++group) {
      narrow_rows<T>(call, group * W, std::min(W, call.rows - group * W), rows, room);
    }
  });
}

// Owns a row's gradient: what is above its block's mean, over epsilon.
template <class T, class A>
void row_gradient(const SoftRankBackward& call, int64_t row) {
  const int64_t n = call.width;
  const A* grad = static_cast<const A*>(call.grad) + row * n;
  const int32_t *order = call.order + row * n, *block = call.block + row * n;
  T* out = static_cast<T*>(call.gradient) + row * n;
  for (int64_t i = 0; i < n;) {
    const int64_t start = block[i];
    double sum = 0;
    int64_t end = i;
    for (; end < n && block[end] == start; ++end) sum += double(grad[order[end]]);
    const double mean = sum / double(end - i);
    for (; i < end; ++i) {
      const double g = (double(grad[order[i]]) - mean) / call.epsilon;
      narrow(A(start < 0 ? 0.0 : start == n ? std::numeric_limits<double>::quiet_NaN() : g), out[order[i]]);
    }
  }
}

template <class T, class A = Accumulator<T>>
void backward(const SoftRankBackward& call, const Parallel& parallel) {
  parallel(call.rows, std::max(int64_t(1), kEntriesATime / std::max(int64_t(1), call.width)),
           [&](int64_t begin, int64_t end) {
             for (int64_t row = begin; row < end; ++row) row_gradient<T, A>(call, row);
           });
}

}  // namespace

extern const SoftRank soft_rank = {
    {forward<float>, forward<bfloat16>, forward<float16>, forward<double>},
    {backward<float>, backward<bfloat16>, backward<float16>, backward<double>},
};

}  // namespace mlot::MLOT_ISA
