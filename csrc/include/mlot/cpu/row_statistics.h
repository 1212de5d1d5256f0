// A row of logits becomes the scalars of its distribution, as mlot_kernels/logits.py defines them.
//
// With x the row, m its peak and c = log2(e) / (temperature * scale), everything is made of t = (x - m) c and 2^t. The
// difference comes first: it is exact near the peak, and a large m costs no digits; folding m c into one multiplication
// and addition would.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "mlot/cpu/logits.h"
#include "mlot/cpu/vector.h"

namespace mlot::MLOT_ISA {

constexpr int64_t kTile = 64;              // columns with one maximum
constexpr int64_t kChunk = 2048;           // columns that stay in the L1 cache between the passes over them
constexpr double kDeviationOffset = 1e-4;  // of the published Multi-Level-OT code, added after the square root

// How many rows are worth a thread's start.
static inline int64_t worth_a_thread(int64_t columns) {
  constexpr int64_t kElements = 32768;
  return kElements / (columns + 1) + 1;
}

static inline int64_t tiles_of(int64_t columns) { return (columns + kTile - 1) / kTile; }

template <class A>
struct RowStatistics {
  A peak;   // m
  A mean;   // of x - m over the columns that are not -inf; 0 without standardize
  A scale;  // standard deviation + 1e-4, or 1
  A slope;  // 1 / ((n - 1) deviation scale^2), or 0
};

// Sums over the columns so far, relative to 2^(peak so far): of 2^t, and of t 2^t.
struct ExponentialSums {
  double total = 0, moment = 0;
};

// Two temperatures for one exponential: `partner`'s 2^t is that of `lead` to the power of an integer.
struct TemperaturePair {
  int64_t lead, partner;  // partner is -1 where lead is alone
  int power;
};

// Pairs the temperatures, each of which stands in one pair. `pairs` has room for all; returns how many were made.
static inline int64_t pair_temperatures(const double* temperatures, int64_t count, TemperaturePair* pairs) {
  constexpr int kLargestPower = 4;  // add_exponentials has these
  int64_t made = 0;
  auto taken = [&](int64_t r) {
    for (int64_t i = 0; i < made; ++i) {
      if (pairs[i].lead == r || pairs[i].partner == r) return true;
    }
    return false;
  };
  for (;;) {
    int64_t lead = -1;
    for (int64_t r = 0; r < count; ++r) {
      if (!taken(r) && (lead < 0 || temperatures[r] > temperatures[lead])) lead = r;
    }
    if (lead < 0) return made;
    TemperaturePair pair{lead, -1, 1};
    for (int64_t r = 0; r < count && pair.partner < 0; ++r) {
      if (r == lead || taken(r)) continue;
      for (int power = 1; power <= kLargestPower; ++power) {
        if (temperatures[lead] == power * temperatures[r]) pair.partner = r, pair.power = power;
      }
    }
    pairs[made++] = pair;
  }
}

// Tile i of `columns` columns at x; the last one is completed with -inf in `pad`.
template <class T>
MLOT_INLINE const T* tile_at(const T* x, int64_t columns, int64_t i, T* pad) {
  const int64_t start = i * kTile;
  if (start + kTile <= columns) return x + start;
  for (int64_t j = 0; j < kTile; ++j) {
    if (start + j < columns) {
      pad[j] = x[start + j];
    } else {
      narrow(-INFINITY, pad[j]);
    }
  }
  return pad;
}

// The maximum of each tile into `maxima`, where that is wanted, and of all. NaN is passed over.
template <class T, class A = Accumulator<T>>
static inline A tile_maxima(const T* x, int64_t columns, A* maxima) {
  T pad[kTile];
  Vector<A> peak = all(A(-INFINITY));
  for (int64_t i = 0; i < tiles_of(columns); ++i) {
    const T* tile = tile_at(x, columns, i, pad);
    Vector<A> a = all(A(-INFINITY)), b = a;
    for (int64_t j = 0; j < kTile; j += 2 * kWidth<A>) {
      const Pair<A> v = load_pair(tile + j);
      a = larger(v.part[0], a);
      b = larger(v.part[1], b);
    }
    a = larger(a, b);
    peak = larger(a, peak);
    if (maxima) maxima[i] = largest<A>(a);
  }
  return largest<A>(peak);
}

template <class T>
MLOT_INLINE void prefetch_tile(const T* tile) {
  constexpr size_t kLine = 64;
#pragma GCC unroll 8
  for (size_t byte = 0; byte < kTile * sizeof(T); byte += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(tile) + byte);
  }
}

// Adds a chunk's sums at one temperature, and where Power > 0 at the one whose 2^t is this one's to that power. Where
// `ahead` is not null, it fetches the chunk that starts there: arithmetic alone would leave the memory idle.
template <int Power, class T, class A = Accumulator<T>>
static inline void add_exponentials(const T* x, int64_t columns, A peak, A factor, ExponentialSums* sums,
                                    ExponentialSums* partner, const T* ahead) {
  T pad[kTile];
  Vector<A> total[2] = {}, moment[2] = {}, partner_total[2] = {}, partner_moment[2] = {};
  for (int64_t i = 0; i < tiles_of(columns); ++i) {
    const T* tile = tile_at(x, columns, i, pad);
    if (ahead) prefetch_tile(ahead + i * kTile);
#pragma GCC unroll 4
    for (int64_t j = 0; j < kTile; j += 2 * kWidth<A>) {
      const Pair<A> v = load_pair(tile + j);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Vector<A> t = at_least_smallest<A>((v.part[h] - peak) * factor);
        const Vector<A> e = exp2_negative<A>(t);
        total[h] += e;
        moment[h] += e * t;
        if constexpr (Power > 0) {
          Vector<A> power = e;
#pragma GCC unroll 4
          for (int i = 1; i < Power; ++i) power *= e;
          partner_total[h] += power;
          partner_moment[h] += power * t;
        }
      }
    }
  }
  sums->total += sum<A>(total[0] + total[1]);
  sums->moment += sum<A>(moment[0] + moment[1]);
  if constexpr (Power > 0) {
    partner->total += sum<A>(partner_total[0] + partner_total[1]);
    partner->moment += Power * double(sum<A>(partner_moment[0] + partner_moment[1]));
  }
}

// Mean and sum of squares about it over the columns that are not -inf, chunk by chunk (Chan, Golub and LeVeque).
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(double n, double chunk_mean, double chunk_squares) {
    if (n == 0) return;
    const double both = count + n, difference = chunk_mean - mean;
    mean += difference * (n / both);
    squares += chunk_squares + difference * difference * (count * n / both);
    count = both;
  }
};

template <class T, class A = Accumulator<T>>
static inline void add_moments(const T* x, int64_t columns, A shift, Moments* moments) {
  T pad[kTile];
  Vector<A> first[2] = {}, second[2] = {};
  VectorBits<A> count[2] = {};
  for (int64_t i = 0; i < tiles_of(columns); ++i) {
    const T* tile = tile_at(x, columns, i, pad);
    for (int64_t j = 0; j < kTile; j += 2 * kWidth<A>) {
      const Pair<A> v = load_pair(tile + j);
      for (int h = 0; h < 2; ++h) {
        const Vector<A> below = v.part[h] - shift;
        const auto present = VectorBits<A>(below != A(-INFINITY));
        first[h] += std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(below) & present);
        count[h] -= present;
      }
    }
  }
  double n = 0;
  for (int l = 0; l < kWidth<A>; ++l) n += double(count[0][l] + count[1][l]);
  if (n == 0) return;
  const A mean = A(double(sum<A>(first[0] + first[1])) / n);
  for (int64_t i = 0; i < tiles_of(columns); ++i) {
    const T* tile = tile_at(x, columns, i, pad);
    for (int64_t j = 0; j < kTile; j += 2 * kWidth<A>) {
      const Pair<A> v = load_pair(tile + j);
      for (int h = 0; h < 2; ++h) {
        const Vector<A> below = v.part[h] - shift, difference = below - mean;
        const auto present = VectorBits<A>(below != A(-INFINITY));
        second[h] += std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(difference * difference) & present);
      }
    }
  }
  moments->add(n, double(mean), double(sum<A>(second[0] + second[1])));
}

// The peak, mean, scale and slope of a row that is to be divided by its standard deviation + 1e-4. Where `maxima` is
// not null, it gets the maxima of the row's tiles.
template <class T, class A = Accumulator<T>>
static inline RowStatistics<A> standardized(const T* x, int64_t columns, A* maxima = nullptr) {
  RowStatistics<A> row{A(-INFINITY), 0, 1, 0};
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = columns - start < kChunk ? columns - start : kChunk;
    const A m = tile_maxima(x + start, n, maxima ? maxima + start / kTile : nullptr);
    row.peak = m > row.peak ? m : row.peak;
  }
  Moments moments;
  for (int64_t start = 0; start < columns; start += kChunk) {
    add_moments(x + start, columns - start < kChunk ? columns - start : kChunk, row.peak, &moments);
  }
  const double n = moments.count, deviation = n > 1 ? std::sqrt(moments.squares / (n - 1)) : 0;
  const double scale = deviation + kDeviationOffset;
  row.mean = A(moments.mean), row.scale = A(scale);
  row.slope = deviation == 0 ? A(0) : A(1 / ((n - 1) * deviation * scale * scale));
  return row;
}

// The statistics of one row of `columns` columns, in one read of it, the later passes over it hitting the cache.
//
// Writes for each temperature r the log of the sum of exp((x - m) / (temperature scale)) to log_total[r * stride], and
// E_q[x - m] to expected[r * stride]; where `maxima` is not null, the maxima of the row's tiles, NaN passed over. Sums
// are added in an order that depends on `columns` alone; they are of the accumulator's type within a chunk and double
// across. A NaN or +inf in the row makes every log_total NaN; so does a row of -inf alone. `sums` has room for `count`.
template <class T, class A = Accumulator<T>>
static inline RowStatistics<A> row_statistics(const T* x, int64_t columns, bool standardize, const double* temperatures,
                                              int64_t count, const TemperaturePair* pairs, int64_t pair_count,
                                              ExponentialSums* sums, A* log_total, A* expected, int64_t stride,
                                              A* maxima) {
  RowStatistics<A> row{A(-INFINITY), 0, 1, 0};
  for (int64_t r = 0; r < count; ++r) sums[r] = {};
  if (standardize) row = standardized(x, columns, maxima);
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = columns - start < kChunk ? columns - start : kChunk;
    if (!standardize) {
      const A m = tile_maxima(x + start, n, maxima ? maxima + start / kTile : nullptr);
      if (m > row.peak) {  // the sums so far become relative to the new peak
        for (int64_t r = 0; r < count; ++r) {
          const double t = (double(row.peak) - double(m)) * (kLog2E / temperatures[r]), factor = std::exp2(t);
          sums[r].moment = sums[r].total == 0 ? 0 : factor * (sums[r].moment + t * sums[r].total);
          sums[r].total *= factor;
        }
        row.peak = m;
      }
    }
    const A shift = row.peak == A(-INFINITY) ? A(0) : row.peak;  // -inf so far, which is 2^t = 0; or NaN, which shows
    const T* ahead = start + 2 * kChunk <= columns ? x + start + kChunk : nullptr;
    for (int64_t i = 0; i < pair_count; ++i) {
      const TemperaturePair pair = pairs[i];
      const A factor = A(kLog2E / (temperatures[pair.lead] * double(row.scale)));
      ExponentialSums* lead = sums + pair.lead;
      ExponentialSums* partner = pair.partner < 0 ? nullptr : sums + pair.partner;
      const auto add = std::array{add_exponentials<0, T>, add_exponentials<1, T>, add_exponentials<2, T>,
                                  add_exponentials<3, T>, add_exponentials<4, T>}[partner ? pair.power : 0];
      add(x + start, n, shift, factor, lead, partner, i ? nullptr : ahead);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const double total = row.peak == A(-INFINITY) ? NAN : sums[r].total;
    log_total[r * stride] = A(std::log(total));
    expected[r * stride] = A(sums[r].moment / total * (temperatures[r] * double(row.scale) / kLog2E));
  }
  return row;
}

// The log-probability of one column: NaN where there is none of that number, -inf where it is not looked at, but in a
// row with NaN. `scaled` is temperature * scale.
template <class T, class A = Accumulator<T>>
static inline A log_probability(const LogitsRows& rows, const T* x, int64_t column, A peak, A scaled, A log_total,
                                A log_scale) {
  if (column < 0 || column >= rows.vocab_size) return NAN;
  const A log_p = (A(wide(x[column])) - peak) / scaled - log_total + log_scale;
  return rows.column_mask && !rows.column_mask[column] && log_p == log_p ? A(-INFINITY) : log_p;
}

}  // namespace mlot::MLOT_ISA
