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
constexpr int64_t kFiner = 16;  // bins of the second level in one of the first

// How one side's logits go into bins: round((top - (x - peak)) per_logit), within 0..bins - 1.
template <class A>
struct BinScale {
  A peak, top, per_logit;
  int64_t bins = kBins;

  // A logit's bin there, divided by kFiner and rounded, is its bin here.
  BinScale finer() const { return {peak, top, per_logit * kFiner, bins * kFiner}; }
};

template <class A>
MLOT_INLINE VectorBits<A> bins_of(Vector<A> x, const BinScale<A>& scale) {
  constexpr A kMagic = sizeof(A) == 4 ? A(0x1.8p23) : A(0x1.8p52);  // added, it leaves the integer in the last bits
  const Vector<A> place = (scale.top - (x - scale.peak)) * scale.per_logit;
  const Vector<A> last = all(A(scale.bins - 1)), inside = larger(place, all(A(0)));  // NaN, too, is inside
  const Vector<A> clamped = inside < last ? inside : last;
  return std::bit_cast<VectorBits<A>>(clamped + kMagic) & ((UnsignedKey<A>(1) << 20) - 1);  // fewer bins than that
}

template <class A>
static inline int64_t bin_of(A x, const BinScale<A>& scale) {
  return int64_t(bins_of<A>(all(x), scale)[0]);
}

// The number that exactly the logits of `bin` and later ones are below; infinity for the first one.
template <class A>
static inline A upper_edge(int64_t bin, const BinScale<A>& scale) {
  if (bin == 0) return INFINITY;
  const auto inside = [&](SortKey<A> key) { return bin_of(value_of<A>(key), scale) >= bin; };
  SortKey<A> below = sort_key(A(-INFINITY)), above = sort_key(A(INFINITY));  // in the bin or later; in an earlier one
  if (!inside(below)) return -INFINITY;
  // What rounding may have moved is close by: from a guess on, steps that double find what encloses it.
  const A guess = scale.peak + (scale.top - (A(bin) - A(0.5)) / scale.per_logit);
  if (std::isfinite(guess)) {
    SortKey<A> key = sort_key(guess);
    for (SortKey<A> step = 1; step < (SortKey<A>(1) << 20) && below < key && key < above; step *= 2) {
      const bool is_inside = inside(key);
      (is_inside ? below : above) = key;
      key = is_inside ? std::min(key, above - step) + step : std::max(key, below + step) - step;
    }
  }
  while (above - 1 > below) {
    const SortKey<A> middle = (below & above) + ((below ^ above) >> 1);
    (inside(middle) ? below : above) = middle;
  }
  return value_of<A>(above);
}

// All bits of the columns whose flag is set, for kWidth flags.
template <class A>
MLOT_INLINE VectorBits<A> columns_kept(const bool* flags) {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth<A>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, flags, sizeof(bytes));
  return VectorBits<A>{} - __builtin_convertvector(bytes, VectorBits<A>);
}

// Tile i of a row, -inf at columns that the mask leaves out and behind the last one.
template <class A>
MLOT_INLINE const A* looked_at_tile(const A* x, const bool* mask, int64_t columns, int64_t i, A* pad) {
  const A* tile = tile_at(x, columns, i, pad);
  if (!mask) return tile;
  mask += i * kTile;
  const int64_t n = std::min(kTile, columns - i * kTile);
  // Without a branch, which half of all columns would mispredict where the mask has no order.
  bool looked_at[kTile] = {};
  __builtin_memcpy(looked_at, mask, n);
  for (int64_t j = 0; j < kTile; j += kWidth<A>) {
    const Vector<A> v = load(tile + j);
    const Vector<A> kept = columns_kept<A>(looked_at + j) ? v : all(A(-INFINITY));
    __builtin_memcpy(pad + j, &kept, sizeof(kept));
  }
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

// Adds how many logits of a row are in each bin to `counts`; what the mask leaves out is in the last one.
template <class A>
static inline void count_bins(const A* x, const bool* mask, int64_t columns, const BinScale<A>& given,
                              uint32_t* counts) {
  const BinScale<A> scale = given;
  uint32_t few_odd[kBins] = {};  // a second bank: an increment waits for the last one of the same counter
  uint32_t* const odd = scale.bins == kBins ? few_odd : counts;
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
  for (int64_t b = 0; b < kBins; ++b) counts[b] += few_odd[b];
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

// Sums over the logits of a row with the weights of their bins; where `open` is not null, the logits in bins of weight
// kOpen, without -inf, go there in the order of their columns, and not into the sums. p is without the row's constant
// factor. Without kSums the sums are 0.
template <bool kSums, class A>
static inline WeightedSums sum_bins(const A* x, const bool* mask, int64_t columns, const BinScale<A>& given, A factor,
                                    const A* weights, Room<A>* open) {
  const BinScale<A> scale = given;
  WeightedSums sums;
  int64_t found = 0;
  A pad[kTile];
  UnsignedKey<A> bins[kTile];
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t n = std::min(kChunk, columns - start);
    const bool* chunk_mask = mask ? mask + start : nullptr;
    Vector<A> total = {}, moment = {};
    for (int64_t i = 0; i < tiles_of(n); ++i) {
      const A* tile = looked_at_tile(x + start, chunk_mask, n, i, pad);
      bins_of_tile(tile, scale, bins);
      if (open && int64_t(open->size()) < found + kTile) open->resize(2 * found + 4 * kTile);
      for (int64_t j = 0; j < kTile; j += kWidth<A>) {
        const Vector<A> v = load(tile + j);
        Vector<A> weight = gather(weights, bins + j);
        const auto is_open = VectorBits<A>(weight == A(kOpen));
        if (any<A>(is_open)) {
          weight = std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(weight) & ~is_open);
          const auto chosen = is_open & VectorBits<A>(v != A(-INFINITY));
          if (open) found += store_chosen<A>(v, chosen, open->data() + found);
        }
        if constexpr (kSums) {
          const Vector<A> t = at_least_smallest<A>((v - scale.peak) * factor);
          const Vector<A> we = weight * exp2_negative<A>(t);
          total += we;
          moment += we * t;
        }
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
