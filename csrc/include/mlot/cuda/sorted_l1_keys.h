// Logits as integers in descending order, and the scalars by which they become probabilities.
#pragma once

#include <cmath>

#include "mlot/cuda/rows.h"
#include "mlot/sorted_l1.h"

namespace mlot::cuda {

template <int kBytes>
struct UnsignedOf;
template <>
struct UnsignedOf<2> {
  using type = uint16_t;
};
template <>
struct UnsignedOf<4> {
  using type = uint32_t;
};
template <>
struct UnsignedOf<8> {
  using type = uint64_t;
};
template <class T>
using DescendingKey = typename UnsignedOf<sizeof(T)>::type;

template <class T>
constexpr DescendingKey<T> kSignBit = DescendingKey<T>(DescendingKey<T>(1) << (8 * sizeof(T) - 1));

// Positive numbers in descending order, then negative ones. Its own inverse.
template <class T>
__device__ inline DescendingKey<T> flip(DescendingKey<T> bits) {
  return bits & kSignBit<T> ? bits : DescendingKey<T>(bits ^ DescendingKey<T>(kSignBit<T> - 1));
}

// The smaller the larger the logit; the same for 0 and -0.
template <class T>
__device__ inline DescendingKey<T> descending_key(Accumulator<T> x) {
  T value;
  narrow(x + Accumulator<T>(0), value);  // the sum of -0 and 0 is 0
  DescendingKey<T> bits;
  memcpy(&bits, &value, sizeof(bits));
  return flip<T>(bits);
}

template <class T>
__device__ inline Accumulator<T> logit_of(DescendingKey<T> key) {
  const DescendingKey<T> bits = flip<T>(key);
  T value;
  memcpy(&value, &bits, sizeof(value));
  return widen(value);
}

// Rounded once, wherever it stands: equal probabilities must be found equal.
__device__ inline float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ inline double multiply_add(double x, double y, double z) { return fma(x, y, z); }

// How a row's logits become probabilities, p = 2^((x - peak) factor) weight.
template <class A>
struct Likelihood {
  A peak, factor, log2_weight, weight;
  A poison;  // 0, or NaN where all is

  __device__ Likelihood(const LogitsRows& rows, const void* peaks, const void* log_totals, const void* scales,
                        int64_t slot) {
    const A log_total = at<A>(log_totals, slot), offset = at<A>(rows.log_scale, slot) - log_total;
    peak = at<A>(peaks, slot);
    factor = A(kLog2E / (rows.temperature * double(at<A>(scales, slot))));
    log2_weight = offset * A(kLog2E);
    weight = A(exp(double(offset)));
    poison = 0 * (log_total + weight);
  }

  // Never larger for a smaller logit.
  __device__ A log2_p(A x) const { return multiply_add(x - peak, factor, log2_weight); }
  __device__ A p(A x) const { return power_of_two((x - peak) * factor) * weight; }
};

// The type in which two rows' log2 p are compared.
template <class A, class B>
using Wider = decltype(A() + B());

template <class Pointer, class A>
__device__ inline Likelihood<A> likelihood(const LogitsRows& rows, const SortedL1Saved<Pointer>& saved, int64_t slot) {
  return Likelihood<A>(rows, saved.peak, saved.log_total, saved.scale, slot);
}

}  // namespace mlot::cuda
