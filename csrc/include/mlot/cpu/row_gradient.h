// The gradient of log-probabilities at a few columns of each row, for all temperatures in one read of the row and one
// write of the gradient; mlot_kernels/logits.py has the formulas (`gradient_at_columns`).
#pragma once

#include <algorithm>
#include <vector>

#include "mlot/cpu/logits_rows.h"
#include "mlot/cpu/row_statistics.h"

namespace mlot::MLOT_ISA {

constexpr int64_t kGradientChunk = 1024;  // columns whose gradient is put together in the L1 cache

// What a thread needs for its rows.
template <class A>
struct GradientScratch {
  struct Kept {
    int64_t column, slot;
    A gradient;  // what dl/dx gets there beside the softmax's part
  };
  std::vector<Kept> kept;
  std::vector<A> factor, weight;  // of each temperature: 2^((x - m) factor) * weight is its part of dl/dx
};

// Copies a finished piece to the output. `stream` writes past the cache: an output that is larger than it would
// otherwise be read before it is written, and push out what is of use. Takes any alignment of `out`.
template <class T>
static inline void put(const T* from, T* out, int64_t count, bool stream) {
#ifdef __SSE2__
  const size_t bytes = size_t(count) * sizeof(T);
  if (stream && bytes % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0) {
    const char* source = reinterpret_cast<const char*>(from);
    char* target = reinterpret_cast<char*>(out);
    for (size_t i = 0; i < bytes; i += kVectorBytes) {
#if defined(__AVX512F__)
      _mm512_stream_si512((__m512i*)(target + i), _mm512_loadu_si512(source + i));
#elif defined(__AVX2__)
      _mm256_stream_si256((__m256i*)(target + i), _mm256_loadu_si256((const __m256i*)(source + i)));
#else
      _mm_stream_si128((__m128i*)(target + i), _mm_loadu_si128((const __m128i*)(source + i)));
#endif
    }
    return;
  }
#else
  (void)stream;
#endif
  __builtin_memcpy(out, from, size_t(count) * sizeof(T));
}

// Makes what was streamed visible to other threads.
static inline void finish_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// How many elements stand before the first one that vectors can be streamed to.
template <class T>
static inline int64_t elements_to_boundary(const T* out) {
  constexpr uintptr_t kLine = 64;
  const uintptr_t rest = reinterpret_cast<uintptr_t>(out) % kLine;
  return rest % sizeof(T) || !rest ? 0 : int64_t((kLine - rest) / sizeof(T));
}

template <class T>
static inline void put_zeros(T* out, int64_t count, bool stream) {
  static const T zeros[kGradientChunk] = {};
  int64_t n = elements_to_boundary(out);
  for (int64_t start = 0; start < count; start += n, n = kGradientChunk) {
    n = std::min(n, count - start);
    put(zeros, out + start, n, stream);
  }
}

// Whether a row of gradient has one temperature, two of which the second's 2^t is the square of the first's, or others.
enum class Temperatures { one, squared, several };

// The softmax's and the deviation's parts of n columns at x into `dx`, in the order of load_pair; room for whole tiles.
// Plain: slope is 0 and all weights are finite, so that nothing more is to do for -inf.
template <Temperatures Kind, bool Plain, class T, class A = Accumulator<T>>
static inline void gradient_chunk(const T* x, int64_t n, A peak, A center, A slope, const A* factor, const A* weight,
                                  int64_t count, A* dx) {
  T pad[kTile];
  for (int64_t i = 0; i < tiles_of(n); ++i) {
    const T* tile = tile_at(x, n, i, pad);
#pragma GCC unroll 2
    for (int64_t j = 0; j < kTile; j += 2 * kWidth<A>) {
      const Pair<A> v = load_pair(tile + j);
      Pair<A> g;
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Vector<A> below = v.part[h] - peak;
        Vector<A> sum = {};
        if constexpr (!Plain) sum = (below - center) * slope;
        if constexpr (Kind == Temperatures::several) {
          for (int64_t r = 0; r < count; ++r) {
            sum += exp2_negative<A>(at_least_smallest<A>(below * factor[r])) * weight[r];
          }
        } else {
          const Vector<A> e = exp2_negative<A>(at_least_smallest<A>(below * factor[0]));
          if constexpr (Kind == Temperatures::one) sum += e * weight[0];
          if constexpr (Kind == Temperatures::squared) sum += e * (weight[0] + e * weight[1]);
        }
        const auto present = VectorBits<A>(below != A(-INFINITY));
        g.part[h] = Plain ? sum : std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(sum) & present);
      }
      store_pair(g, dx + i * kTile + j);
    }
  }
}

template <class T>
static inline auto gradient_chunk_of(Temperatures kind, bool plain) {
  using enum Temperatures;
  if (kind == one) return plain ? gradient_chunk<one, true, T> : gradient_chunk<one, false, T>;
  if (kind == squared) return plain ? gradient_chunk<squared, true, T> : gradient_chunk<squared, false, T>;
  return plain ? gradient_chunk<several, true, T> : gradient_chunk<several, false, T>;
}

// What one row's gradient is made from.
template <class A>
struct GradientOfRow {
  const A* log_p;          // dl/dlog p of the k columns: log_p[r * log_p_stride + i]
  int64_t log_p_stride;
  const A* kept;           // log p of the k columns at the first temperature, or null
  A mass;                  // dl/d of the sum of their exp
  A lse;                   // dl/d of the log of the sum of exp at the first temperature
  const int64_t* columns;  // [k]; they may repeat
  int64_t k;
};

// The scalars that forward saved of one row; those of temperature r at [r * stride].
template <class A>
struct ScalarsOfRow {
  const A *log_total, *expected;
  int64_t stride;
  A peak, mean, scale, slope;
};

// Reads the row `x` once, writes `rows.width` elements of gradient to `out`, zeros beyond the distribution's columns.
// Columns that do not exist or are not looked at pass nothing on. Returns the gradient of the row's log scale.
template <class T, class A = Accumulator<T>>
static inline A row_gradient(const LogitsRows& rows, const T* x, const ScalarsOfRow<A>& saved,
                             const GradientOfRow<A>& gradient, GradientScratch<A>& scratch, T* out, bool stream) {
  const int64_t R = rows.temperature_count;
  auto& kept = scratch.kept;
  kept.clear();
  for (int64_t i = 0; i < gradient.k; ++i) {
    const int64_t column = gradient.columns[i];
    if (column < 0 || column >= rows.vocab_size || (rows.column_mask && !rows.column_mask[column])) continue;
    kept.push_back({column, i, A(0)});
  }
  scratch.factor.resize(R), scratch.weight.resize(R);
  double all_temperatures = 0, through_deviation = 0;
  for (int64_t r = 0; r < R; ++r) {
    const double scaled = rows.temperatures[r] * double(saved.scale);
    double total = 0, moment = 0, absent = 0;
    for (auto& column : kept) {
      double h = gradient.log_p[r * gradient.log_p_stride + column.slot];
      if (r == 0 && gradient.kept) h += double(gradient.mass) * std::exp(double(gradient.kept[column.slot]));
      const A below = A(wide(x[column.column])) - saved.peak;
      total += h;
      (below == A(-INFINITY) ? absent : moment) += below == A(-INFINITY) ? h : h * double(below);
      column.gradient += A(h / scaled);
    }
    const double lse = r == 0 ? double(gradient.lse) : 0.0;
    all_temperatures += total;
    moment += double(saved.peak) * (lse - absent) - (total - lse) * double(saved.expected[r * saved.stride]);
    through_deviation += moment / rows.temperatures[r];
    scratch.factor[r] = A(kLog2E / scaled);
    scratch.weight[r] = A((lse - total) * std::exp(-double(saved.log_total[r * saved.stride])) / scaled);
  }
  std::sort(kept.begin(), kept.end(), [](const auto& a, const auto& b) {
    return a.column != b.column ? a.column < b.column : a.slot < b.slot;
  });

  Temperatures kind = R == 1 ? Temperatures::one : Temperatures::several;
  if (R == 2 && rows.temperatures[0] == 2 * rows.temperatures[1]) kind = Temperatures::squared;
  if (R == 2 && rows.temperatures[1] == 2 * rows.temperatures[0]) {
    std::swap(scratch.factor[0], scratch.factor[1]), std::swap(scratch.weight[0], scratch.weight[1]);
    kind = Temperatures::squared;
  }
  const A slope = A(-double(saved.slope) * through_deviation);
  bool plain = slope == 0;
  for (const A weight : scratch.weight) plain = plain && std::isfinite(weight);
  const auto chunk = gradient_chunk_of<T>(kind, plain);
  alignas(64) A dx[kGradientChunk];
  alignas(64) T rounded[kGradientChunk];
  size_t next = 0;
  int64_t n = elements_to_boundary(out);
  for (int64_t start = 0; start < rows.vocab_size; start += n, n = kGradientChunk) {
    n = std::min(n, rows.vocab_size - start);
    if (n == 0) continue;
    chunk(x + start, n, saved.peak, saved.mean, slope, scratch.factor.data(), scratch.weight.data(), R, dx);
    for (; next < kept.size() && kept[next].column < start + n; ++next) {
      if (A(wide(x[kept[next].column])) - saved.peak == A(-INFINITY)) continue;
      dx[position_in_pairs<T>(kept[next].column - start)] += kept[next].gradient;
    }
    if constexpr (std::is_same_v<T, A>) {
      put(dx, out + start, n, stream);
    } else {
      if (plain) {
        for (int64_t j = 0; j < n; j += 2 * kWidth<A>) store_pair_without_nan<T>(load_pair(dx + j), rounded + j);
      } else {
        for (int64_t j = 0; j < n; j += 2 * kWidth<A>) store_pair(load_pair(dx + j), rounded + j);
      }
      put(rounded, out + start, n, stream);
    }
  }
  put_zeros(out + rows.vocab_size, rows.width - rows.vocab_size, stream);
  return A(all_temperatures);
}

// All of grad_values [B, T, width], rows that do not count as zeros, and grad_log_scale [B, A].
//
// Args:
//   gradient_of: slot -> GradientOfRow.
template <class T, class GradientOf>
static inline void gradient_of_rows(const LogitsRows& rows, const SavedScalars<const void*>& saved, void* grad_values,
                                    void* grad_log_scale, const Parallel& parallel, const GradientOf& gradient_of) {
  using A = Accumulator<T>;
  constexpr int64_t kStreamed = 4 << 20;  // bytes of an output that the caches would hardly keep
  const int64_t slots = rows.all_slots();
  std::vector<int64_t> slot_of(rows.sequences * rows.positions, -1);
  for (int64_t slot = 0; slot < slots; ++slot) {
    static_cast<A*>(grad_log_scale)[slot] = 0;
    if (rows.index[slot] >= 0) slot_of[slot / rows.slots * rows.positions + rows.index[slot]] = slot;
  }
  const bool stream = rows.sequences * rows.positions * rows.width * int64_t(sizeof(T)) >= kStreamed;
  const auto at = [](const void* scalars, int64_t slot) { return static_cast<const A*>(scalars)[slot]; };
  parallel(rows.sequences * rows.positions, worth_a_thread(rows.width), [&](int64_t first, int64_t last) {
    GradientScratch<A> scratch;
    for (int64_t position = first; position < last; ++position) {
      T* out = static_cast<T*>(grad_values) + position * rows.width;
      const int64_t slot = slot_of[position];
      if (slot < 0) {
        put_zeros(out, rows.width, stream);
        continue;
      }
      const ScalarsOfRow<A> scalars{
          .log_total = static_cast<const A*>(saved.log_total) + slot,
          .expected = static_cast<const A*>(saved.expected) + slot,
          .stride = slots,
          .peak = at(saved.peak, slot),
          .mean = at(saved.mean, slot),
          .scale = at(saved.scale, slot),
          .slope = at(saved.slope, slot),
      };
      static_cast<A*>(grad_log_scale)[slot] =
          row_gradient(rows, row_of<T>(rows, slot), scalars, gradient_of(slot), scratch, out, stream);
    }
    if (stream) finish_stream();
  });
}

}  // namespace mlot::MLOT_ISA
