// Bins of log2 p that two rows share, for logits that are too many to count by value: which bin a logit is in, how many
// are in each, and sums over bins whose elements need not be told apart.
//
// A bin's index is made of the logit by steps that each keep the order, so that a larger logit is never in a later bin.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "mlot/cpu/row_statistics.h"
#include "mlot/cpu/run_length.h"

namespace mlot::MLOT_ISA {

constexpr int64_t kBins = 4096;

// How one side's logits go into bins: round((top - (x - peak)) per_logit), within 0..kBins - 1.
template <class A>
struct BinScale {
  A peak, top, per_logit;
};

template <class A>
MLOT_INLINE VectorBits<A> bins_of(Vector<A> x, const BinScale<A>& scale) {
  constexpr A kMagic = sizeof(A) == 4 ? A(0x1.8p23) : A(0x1.8p52);  // added, it leaves the integer in the last bits
  const Vector<A> place = (scale.top - (x - scale.peak)) * scale.per_logit;
  const Vector<A> last = all(A(kBins - 1)), inside = larger(place, all(A(0)));  // NaN, too, is inside
  const Vector<A> clamped = inside < last ? inside : last;
  return std::bit_cast<VectorBits<A>>(clamped + kMagic) & (2 * kBins - 1);
}

template <class A>
static inline int64_t bin_of(A x, const BinScale<A>& scale) {
  return int64_t(bins_of<A>(all(x), scale)[0]);
}

// The number that exactly the logits of `bin` > 0 and later ones are below.
template <class A>
static inline A upper_edge(int64_t bin, const BinScale<A>& scale) {
  SortKey<A> below = sort_key(A(-INFINITY)), above = sort_key(A(INFINITY));  // in the bin or later; in an earlier one
  if (bin_of(A(-INFINITY), scale) < bin) return -INFINITY;
  while (above - 1 > below) {
    const SortKey<A> middle = (below & above) + ((below ^ above) >> 1);
    (bin_of(value_of<A>(middle), scale) < bin ? above : below) = middle;
  }
  return value_of<A>(above);
}

// Tile i of a row, -inf at columns that the mask leaves out and behind the last one.
template <class A>
MLOT_INLINE const A* looked_at_tile(const A* x, const bool* mask, int64_t columns, int64_t i, A* pad) {
  const A* tile = tile_at(x, columns, i, pad);
  if (!mask) return tile;
  mask += i * kTile;
  const int64_t n = std::min(kTile, columns - i * kTile);
  for (int64_t j = 0; j < n; ++j) pad[j] = mask[j] ? tile[j] : A(-INFINITY);
  return pad;
}

template <class A>
MLOT_INLINE void bins_of_tile(const A* tile, const BinScale<A>& scale, UnsignedKey<A>* bins) {
#pragma GCC unroll 4
  for (int64_t j = 0; j < kTile; j += kWidth<A>) {
    Vector<A> x;
    __builtin_memcpy(&x, tile + j, sizeof(x));
    const VectorBits<A> own = bins_of<A>(x, scale);
    __builtin_memcpy(bins + j, &own, sizeof(own));
  }
}

// Adds how many logits of a row are in each bin to `counts` [kBins]; what the mask leaves out is in the last one.
template <class A>
static inline void count_bins(const A* x, const bool* mask, int64_t columns, const BinScale<A>& given,
                              uint32_t* counts) {
  const BinScale<A> scale = given;
  uint32_t odd[kBins] = {};  // a second bank: an increment waits for the last one of the same counter
  A pad[kTile];
  UnsignedKey<A> bins[kTile];
  for (int64_t i = 0; i < tiles_of(columns); ++i) {
    bins_of_tile(looked_at_tile(x, mask, columns, i, pad), scale, bins);
    const int64_t n = std::min(kTile, columns - i * kTile);
    if (n == kTile) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < kTile; j += 2) ++counts[bins[j]], ++odd[bins[j + 1]];
    } else {
      for (int64_t j = 0; j < n; ++j) ++counts[bins[j]];
    }
  }
  for (int64_t b = 0; b < kBins; ++b) counts[b] += odd[b];
}

// table[i] for kWidth indices.
template <class A>
MLOT_INLINE Vector<A> gather(const A* table, const UnsignedKey<A>* indices) {
#if defined(__AVX512F__)
  const __m512i i = _mm512_loadu_si512(indices);
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm512_mask_i32gather_ps(__m512{}, 0xffff, i, table, 4);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm512_mask_i64gather_pd(__m512d{}, 0xff, i, table, 8);
#elif defined(__AVX2__)
  const __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
  if constexpr (sizeof(A) == 4) return (Vector<A>)_mm256_i32gather_ps(table, i, 4);
  if constexpr (sizeof(A) == 8) return (Vector<A>)_mm256_i64gather_pd(table, i, 8);
#else
  Vector<A> v;
  for (int l = 0; l < kWidth<A>; ++l) v[l] = table[indices[l]];
  return v;
#endif
}

struct WeightedSums {
  double total = 0, moment = 0;  // of weight p; of weight p (x - peak)
};

// A bin whose logits must be told apart.
constexpr float kOpen = 3;

// Sums over the logits of a row with the weights [kBins] of their bins; where `open` is not null, the descending keys
// of finite logits in bins of weight kOpen go there, in the order of their columns, and not into the sums. In both, p
// is without the row's constant factor.
template <class A>
static inline WeightedSums sum_bins(const A* x, const bool* mask, int64_t columns, const BinScale<A>& given, A factor,
                                    const A* weights, std::vector<UnsignedKey<A>>* open) {
  const BinScale<A> scale = given;
  WeightedSums sums;
  size_t found = 0;
  A pad[kTile];
  UnsignedKey<A> bins[kTile];
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    const bool* chunk_mask = mask ? mask + start : nullptr;
    Vector<A> total = {}, moment = {};
    for (int64_t i = 0; i < tiles_of(n); ++i) {
      const A* tile = looked_at_tile(x + start, chunk_mask, n, i, pad);
      bins_of_tile(tile, scale, bins);
      VectorBits<A> any = {};
      for (int64_t j = 0; j < kTile; j += kWidth<A>) {
        Vector<A> v;
        __builtin_memcpy(&v, tile + j, sizeof(v));
        Vector<A> weight = gather(weights, bins + j);
        const auto is_open = VectorBits<A>(weight == A(kOpen));
        any |= is_open;
        weight = std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(weight) & ~is_open);
        const Vector<A> t = at_least_smallest<A>((v - scale.peak) * factor);
        const Vector<A> we = weight * exp2_negative<A>(t);
        total += we;
        moment += we * t;
      }
      UnsignedKey<A> lanes = 0;
#pragma GCC unroll 16
      for (int l = 0; l < kWidth<A>; ++l) lanes |= any[l];
      if (!lanes || !open) continue;
      if (open->size() < found + kTile) open->resize(2 * found + 4 * kTile);
      for (int64_t j = 0; j < kTile; ++j) {
        (*open)[found] = descending_key(tile[j]);
        found += (weights[bins[j]] == A(kOpen)) & (tile[j] != A(-INFINITY));
      }
    }
    sums.total += double(sum<A>(total));
    sums.moment += double(sum<A>(moment));
  }
  if (open) open->resize(found);
  sums.moment /= double(factor);
  return sums;
}

}  // namespace mlot::MLOT_ISA
