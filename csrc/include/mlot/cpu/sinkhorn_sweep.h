// Products of a kernel with a vector from either side, in one read of it: the loop that Sinkhorn's steps and their
// adjoints are made of.
#pragma once

#include <array>

#include "mlot/cpu/sinkhorn_problem.h"

namespace mlot::MLOT_ISA {

// Lanes of x and y whose sum with their neighbours' is one step of sum_four, every 4 lanes by themselves.
template <int Odd>
MLOT_INLINE Vector<float> every_other(Vector<float> x, Vector<float> y) {
  typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));
  constexpr int W = kWidth<float>;
  constexpr auto lanes = [] {
    std::array<int32_t, W> l{};
    for (int i = 0; i < W; ++i) l[i] = i / 4 * 4 + (i % 4 < 2 ? 0 : W) + i % 2 * 2 + Odd;
    return l;
  }();
  return __builtin_shuffle(x, y, std::bit_cast<Lanes>(lanes));
}

// The sums of 4 vectors, without a sum of its own for each.
MLOT_INLINE void sum_four(const Vector<float>* v, float* sums) {
  const Vector<float> first = every_other<0>(v[0], v[1]) + every_other<1>(v[0], v[1]),
                      second = every_other<0>(v[2], v[3]) + every_other<1>(v[2], v[3]),
                      parts = every_other<0>(first, second) + every_other<1>(first, second);
  typedef float Four __attribute__((vector_size(16)));
  Four quarter[kWidth<float> / 4];
  __builtin_memcpy(quarter, &parts, sizeof(parts));
  for (int q = 1; q < kWidth<float> / 4; ++q) quarter[0] += quarter[q];
  __builtin_memcpy(sums, quarter, sizeof(Four));
}

template <int R, class A>
MLOT_INLINE void sum_each(const Vector<A>* v, A* sums) {
  if constexpr (std::is_same_v<A, float> && R % 4 == 0) {
    for (int r = 0; r < R; r += 4) sum_four(v + r, sums + r);
  } else {
    for (int r = 0; r < R; ++r) sums[r] = sum<A>(v[r]);
  }
}

// R rows times `weights` [width].
template <int R, class A>
MLOT_INLINE void dot_rows(const A* rows, int64_t width, const A* weights, A* dots) {
  constexpr int kParts = R == 8 ? 1 : 2;  // so many sums at once hide what an addition takes
  Vector<A> part[kParts][R] = {};
  for (int64_t j = 0; j < width; j += kParts * kWidth<A>) {
#pragma GCC unroll 2
    for (int h = 0; h < kParts; ++h) {
      const Vector<A> weight = load(weights + j + h * kWidth<A>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) part[h][r] += load(rows + r * width + j + h * kWidth<A>) * weight;
    }
  }
  if constexpr (kParts == 2) {
    for (int r = 0; r < R; ++r) part[0][r] += part[1][r];
  }
  sum_each<R, A>(part[0], dots);
}

// sums [width] += scales times R rows.
template <int R, class A>
MLOT_INLINE void add_rows(const A* rows, int64_t width, const A* scales, A* sums) {
  for (int64_t j = 0; j < width; j += 2 * kWidth<A>) {
    // The next rows, too short for the processor to see that they are coming.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(rows + (r + R) * width + j);
    Vector<A> first = load(sums + j), second = load(sums + j + kWidth<A>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      first += scales[r] * load(rows + r * width + j);
      second += scales[r] * load(rows + r * width + j + kWidth<A>);
    }
    store(first, sums + j), store(second, sums + j + kWidth<A>);
  }
}

// R neighbouring elements of a vector over rows. Never a result or an argument: it may be wider than a register.
template <class A, int R>
struct Few {
  typedef A Values __attribute__((vector_size(R * sizeof(A))));
  Values values;

  explicit Few(const A* x) { __builtin_memcpy(&values, x, sizeof(values)); }
  void store(A* out) const { __builtin_memcpy(out, &values, sizeof(values)); }
};

// body.template operator()<R>(i) for blocks of R rows from i on, that stay in the L1 cache.
template <class A, class Body>
MLOT_INLINE void over_blocks(int64_t first, int64_t last, int64_t width, const Body& body) {
  constexpr int64_t kBytes = 2048;  // of a row up to which 8 of them leave room for the vectors
  int64_t i = first;
  if (width * int64_t(sizeof(A)) <= kBytes) {
    for (; i + 8 <= last; i += 8) body.template operator()<8>(i);
  }
  for (; i + 4 <= last; i += 4) body.template operator()<4>(i);
  for (; i < last; ++i) body.template operator()<1>(i);
}

// For each row i of `kernel` [m, width]: scale_i is made of kernel_i . weights, and `sums` is sum_i scale_i kernel_i.
//
// Args:
//   before: before.template operator()<R>(i) is called before rows i .. i + R are read.
//   factor: factor.template operator()<R>(i, dots, scales) makes the scales of rows i .. i + R.
template <class A, class Before, class Factor>
static inline void sweep(A* kernel, int64_t width, const A* weights, const Slabs<A>& slabs, Buffer<A>& scratch, A* sums,
                         const Before& before, const Factor& factor) {
  slabs.sum(sums, width, scratch, [&](int64_t first, int64_t last, A* partial) {
    over_blocks<A>(first, last, width, [&]<int R>(int64_t i) {
      A dots[R], scales[R];
      before.template operator()<R>(i);
      dot_rows<R, A>(kernel + i * width, width, weights, dots);
      factor.template operator()<R>(i, dots, scales);
      add_rows<R, A>(kernel + i * width, width, scales, partial);
    });
  });
}

}  // namespace mlot::MLOT_ISA
