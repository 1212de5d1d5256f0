// The k columns with the largest sums of probability over many rows, without a sum for each column.
//
// A tile's largest probabilities, one of each row, add up to a bound on the sums of all its columns, and reading the
// row for its normaliser leaves the tiles' maxima behind. So: sums are made in the tiles with the largest bounds; their
// k-th largest tile maximum is a value that k columns reach; sums are made in the tiles whose bound reaches it, too.
// What is left out has smaller sums, whatever the logits: the bounds are raised by more than rounding can lower them.
// Flat rows need every tile, peaked ones few.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "mlot/cpu/row_statistics.h"
#include "mlot/cpu/select.h"

namespace mlot::MLOT_ISA {

constexpr int64_t kPartialRows = 64;  // counted rows of a sequence that one partial sum covers, whatever the batch

// A counted row as the sums see it: its probabilities are 2^((x - peak) factor) * weight.
template <class T, class A = Accumulator<T>>
struct WeightedRow {
  const T* x;
  A peak, factor, weight;
  bool starts_partial;
};

template <class A>
struct Ranking {
  int64_t first = 0, last = 0;  // its rows
  bool poisoned = false;        // a row has no probabilities: NaN
  A reached = -INFINITY;        // k columns have no smaller sum
  std::vector<A> bounds;        // of each tile
  std::vector<int64_t> tiles;   // whose sums are made
  std::vector<A> sums;          // [tiles, kTile]
};

// The maxima of one row's tiles become bounds of its probabilities there.
template <class T, class A = Accumulator<T>>
static inline void maxima_to_bounds(const WeightedRow<T>& row, A* maxima, int64_t tiles) {
  for (int64_t i = 0; i < tiles; i += kWidth<A>) {
    Vector<A> v = all(A(-INFINITY));
    const int64_t n = std::min(int64_t(kWidth<A>), tiles - i);
    __builtin_memcpy(&v, maxima + i, n * sizeof(A));
    v = exp2_negative<A>(at_least_smallest<A>((v - row.peak) * row.factor)) * row.weight;
    __builtin_memcpy(maxima + i, &v, n * sizeof(A));
  }
}

// The sums of the columns of one tile, [kTile], over `rows`, in their order: partial sums of kPartialRows, then these.
template <class T, class A = Accumulator<T>>
static inline void tile_sums(const WeightedRow<T>* rows, int64_t count, int64_t columns, int64_t tile, A* sums) {
  constexpr int kVectors = kTile / kWidth<A>;
  constexpr int64_t kAhead = 4;  // rows; their tiles are far apart, where no prefetcher looks
  T pad[kTile];
  Vector<A> total[kVectors] = {}, partial[kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) prefetch_tile(rows[i + kAhead].x + tile * kTile);
    const WeightedRow<T> row = rows[i];
    if (row.starts_partial) {
      for (int v = 0; v < kVectors; ++v) total[v] += partial[v], partial[v] = Vector<A>{};
    }
    const T* x = tile_at(row.x + tile * kTile, columns - tile * kTile, 0, pad);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) {
      const Pair<A> z = load_pair(x + v * kWidth<A>);
      for (int h = 0; h < 2; ++h) {
        partial[v + h] += exp2_negative<A>(at_least_smallest<A>((z.part[h] - row.peak) * row.factor)) * row.weight;
      }
    }
  }
  alignas(64) A in_pairs[kTile];
  for (int v = 0; v < kVectors; ++v) {
    total[v] += partial[v];
    __builtin_memcpy(in_pairs + v * kWidth<A>, &total[v], sizeof(total[v]));
  }
  for (int64_t j = 0; j < kTile; ++j) sums[j] = in_pairs[position_in_pairs<T>(j)];
}

// Adds up the tiles' bounds and names the first tiles whose sums are to be made. `row_bounds` are of the ranking's
// rows.
template <class A>
static inline void choose_first_tiles(Ranking<A>& ranking, const A* row_bounds, int64_t tiles, int64_t k) {
  const int64_t rows = ranking.last - ranking.first;
  ranking.bounds.assign(tiles, A(0));
  for (int64_t i = 0; i < rows; ++i) {
    A* bounds = ranking.bounds.data();
#pragma omp simd
    for (int64_t j = 0; j < tiles; ++j) bounds[j] += row_bounds[i * tiles + j];
  }
  const A slack = A(1 + 1e-5 + 2e-7 * double(rows));  // exp2 is off by 2e-7, each addition by 6e-8
  for (A& bound : ranking.bounds) bound = bound == bound ? bound * slack : A(INFINITY);
  ranking.tiles.resize(tiles);
  for (int64_t j = 0; j < tiles; ++j) ranking.tiles[j] = j;
  const int64_t first = std::min(tiles, k);
  if (first < tiles) {
    const A* bounds = ranking.bounds.data();
    std::nth_element(ranking.tiles.begin(), ranking.tiles.begin() + first, ranking.tiles.end(),
                     [bounds](int64_t a, int64_t b) { return bounds[a] > bounds[b]; });
    ranking.tiles.resize(first);
    std::sort(ranking.tiles.begin(), ranking.tiles.end());
  }
  ranking.sums.resize(ranking.tiles.size() * kTile);
}

// Adds the tiles that the first sums do not rule out.
template <class A>
static inline void choose_further_tiles(Ranking<A>& ranking, const bool* mask, int64_t columns, int64_t k) {
  std::vector<A> maxima;
  for (size_t i = 0; i < ranking.tiles.size(); ++i) {
    A most = -INFINITY;
    const int64_t start = ranking.tiles[i] * kTile, n = std::min(kTile, columns - start);
    for (int64_t j = 0; j < n; ++j) {
      const A sum = ranking.sums[i * kTile + j];
      if (sum > most && (!mask || mask[start + j])) most = sum;
    }
    maxima.push_back(most);
  }
  if (int64_t(maxima.size()) >= k) {
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<A>());
    ranking.reached = maxima[k - 1];
  }
  const size_t first = ranking.tiles.size();
  size_t next = 0;
  for (int64_t j = 0; j < int64_t(ranking.bounds.size()); ++j) {
    if (next < first && ranking.tiles[next] == j) {
      ++next;
    } else if (ranking.bounds[j] >= ranking.reached) {
      ranking.tiles.push_back(j);
    }
  }
  ranking.sums.resize(ranking.tiles.size() * kTile);
}

// The columns in order, those that are not looked at last: what a stable sort makes of equal sums.
static inline void columns_in_order(const bool* mask, int64_t columns, int64_t k, int64_t* out) {
  int64_t made = 0;
  for (int64_t v = 0; v < columns && made < k; ++v) {
    if (!mask || mask[v]) out[made++] = v;
  }
  for (int64_t v = 0; v < columns && made < k; ++v) {
    if (!mask[v]) out[made++] = v;
  }
}

// The k columns in descending order of their sums, NaN first, the lower column first among equals. Returns whether the
// first sum is NaN.
template <class A>
static inline bool ranked_columns(const Ranking<A>& ranking, const bool* mask, int64_t columns, int64_t k,
                                  int64_t* out) {
  std::vector<Candidate<A>> candidates;
  bool nan = false;
  for (size_t i = 0; i < ranking.tiles.size(); ++i) {
    const int64_t start = ranking.tiles[i] * kTile, n = std::min(kTile, columns - start);
    for (int64_t j = 0; j < n; ++j) {
      const A sum = ranking.sums[i * kTile + j];
      if (sum < ranking.reached || (mask && !mask[start + j])) continue;
      nan |= sum != sum;
      candidates.push_back(candidate<A>(sort_key(sum), start + j));
    }
  }
  const auto greater = std::greater<Candidate<A>>();
  if (int64_t(candidates.size()) > k) {
    std::nth_element(candidates.begin(), candidates.begin() + k, candidates.end(), greater);
    candidates.resize(k);
  }
  std::sort(candidates.begin(), candidates.end(), greater);
  int64_t made = 0;
  for (const auto c : candidates) out[made++] = column_of(c);
  for (int64_t v = 0; v < columns && made < k; ++v) {
    if (!mask[v]) out[made++] = v;
  }
  return nan;
}

}  // namespace mlot::MLOT_ISA
