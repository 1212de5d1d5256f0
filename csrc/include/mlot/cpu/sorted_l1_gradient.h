// The gradient of sorted_l1 for one row of a side: one read and one write, every sum over columns being known.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "mlot/cpu/logits.h"
#include "mlot/cpu/probability_bins.h"
#include "mlot/cpu/row_statistics.h"
#include "mlot/cpu/sorted_l1_steps.h"

namespace mlot::MLOT_ISA {

// dl/dx = 2^((x - peak) factor) weight (sign scale_of_p - total) - (x - peak - mean) slope; 0 at -inf. The sign is 0 in
// columns that are not looked at.
template <class A>
struct SignedGradient {
  A peak, factor, weight, scale_of_p, total, mean, slope;

  A coefficient(A sign) const { return weight * (sign * scale_of_p - total); }
};

// The gradient of 2 kWidth columns from their `coefficients`, weight (sign scale_of_p - total).
template <class T, class A = Accumulator<T>>
MLOT_INLINE void write_gradient(const Pair<A>& x, const Pair<A>& coefficients, const SignedGradient<A>& g, T* out) {
  Pair<A> dx;
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const Vector<A> below = x.part[h] - g.peak;
    const Vector<A> e = exp2_negative<A>(at_least_smallest<A>(below * g.factor));
    const Vector<A> all_of_it = e * coefficients.part[h] - (below - g.mean) * g.slope;
    const auto present = VectorBits<A>(x.part[h] != A(-INFINITY));
    dx.part[h] = std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(all_of_it) & present);
  }
  store_pair(dx, out);
}

// The same for `n` columns whose signs are few steps, which every column is compared with.
template <class T, class A = Accumulator<T>>
static inline void gradient_by_steps(const T* x, int64_t n, const SignedGradient<A>& given, const Steps<A>& steps,
                                     T* out) {
  constexpr int64_t kStep = 2 * kWidth<A>;
  const SignedGradient<A> g = given;  // a copy, which `out` cannot change
  const int64_t count = steps.size();
  Vector<A> thresholds[kSavedSteps], coefficients[kSavedSteps];
  for (int64_t i = 0; i < count; ++i) {
    thresholds[i] = all(steps.below[i]);
    coefficients[i] = Vector<A>{} + g.coefficient(steps.sign[i]);
  }
  int64_t j = 0;
  const auto one = [&](const T* from, T* to) __attribute__((always_inline)) {
    const Pair<A> v = load_pair(from);
    Pair<A> own = {{coefficients[0], coefficients[0]}};
    for (int64_t i = 1; i < count; ++i) {
      own.part[0] = v.part[0] < thresholds[i] ? coefficients[i] : own.part[0];
      own.part[1] = v.part[1] < thresholds[i] ? coefficients[i] : own.part[1];
    }
    write_gradient(v, own, g, to);
  };
  for (; j + kStep <= n; j += kStep) one(x + j, out + j);
  if (j == n) return;
  T pad[kStep] = {};
  std::copy(x + j, x + n, pad);
  one(pad, pad);
  std::copy(pad, pad + (n - j), out + j);
}

// The same for more steps, none split: a table from bins of the logit to signs. Logits in bins that a threshold lies in
// are looked for among the steps, one by one.
template <class A>
static inline void gradient_by_bins(const A* x, int64_t n, const SignedGradient<A>& given, const Steps<A>& steps,
                                    Room<A>& signs, A* out) {
  constexpr int64_t kStep = 2 * kWidth<A>, kThresholdBins = 16384;
  const SignedGradient<A> g = given;  // a copy, which `out` cannot change
  const int64_t count = steps.size();
  const A first = steps.below[1];
  A last = first;
  for (int64_t i = 1; i < count; ++i) last = std::isfinite(steps.below[i]) ? steps.below[i] : last;
  const BinScale<A> scale{0, first, A(kThresholdBins - 1) / (first - last), kThresholdBins};
  signs.resize(kThresholdBins);
  int64_t made = 0;
  for (int64_t i = 1; i < count; ++i) {
    const int64_t bin = bin_of(steps.below[i], scale);
    while (made < bin) signs[made++] = steps.sign[i - 1];
    if (made == bin) signs[made++] = A(kOpen);
  }
  while (made < kThresholdBins) signs[made++] = steps.sign[count - 1];
  const auto search = [&](A value) {
    const auto end = std::partition_point(steps.below.begin(), steps.below.end(), [=](A b) { return value < b; });
    return steps.sign[end - steps.below.begin() - 1];
  };
  const auto one = [&](const A* from, A* to) __attribute__((always_inline)) {
    const Pair<A> v = load_pair(from);
    Pair<A> coefficients;
    for (int h = 0; h < 2; ++h) {
      const VectorBits<A> bins = bins_of<A>(v.part[h], scale);
      UnsignedKey<A> indices[kWidth<A>];
      __builtin_memcpy(indices, &bins, sizeof(bins));
      Vector<A> sign = gather(signs.data(), indices);
      if (any<A>(VectorBits<A>(sign == A(kOpen)))) {
        for (int l = 0; l < kWidth<A>; ++l) sign[l] = sign[l] == A(kOpen) ? search(v.part[h][l]) : sign[l];
      }
      coefficients.part[h] = g.weight * (sign * g.scale_of_p - g.total);
    }
    write_gradient(v, coefficients, g, to);
  };
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) one(x + j, out + j);
  if (j == n) return;
  A pad[kStep] = {};
  std::copy(x + j, x + n, pad);
  one(pad, pad);
  std::copy(pad, pad + (n - j), out + j);
}

// Gives columns that the mask leaves out the gradient of a column without a sign, in place of what `out` has there.
template <class T, class A = Accumulator<T>>
static inline void leave_out(const T* x, const bool* mask, int64_t n, const SignedGradient<A>& g, T* out) {
  constexpr int64_t kBlock = 1024;
  Steps<A> no_sign;
  no_sign.add(A(0), A(0), [] { return A(0); });
  T pad[kBlock];
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = std::min(kBlock, n - start);
    gradient_by_steps(x + start, count, g, no_sign, pad);
    // Without a branch, which half of all columns would mispredict where the mask has no order.
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, UnsignedKey<A>>;
    const uint8_t* looked_at = reinterpret_cast<const uint8_t*>(mask) + start;
    T* own = out + start;
    for (int64_t j = 0; j < count; ++j) {
      const Bits kept = Bits(0) - Bits(looked_at[j]);
      own[j] =
          std::bit_cast<T>(Bits((std::bit_cast<Bits>(own[j]) & kept) | (std::bit_cast<Bits>(pad[j]) & Bits(~kept))));
    }
  }
}

// The same for signs that `sign_of`, called for every column in order, gives one by one.
template <class T, class SignOf, class A = Accumulator<T>>
static inline void gradient_by_column(const T* x, int64_t n, const SignedGradient<A>& g, const SignOf& sign_of,
                                      T* out) {
  constexpr int64_t kStep = 2 * kWidth<A>;
  T pad[kStep];
  for (int64_t j = 0; j < n; j += kStep) {
    const int64_t count = std::min(kStep, n - j);
    A wide_x[kStep] = {}, coefficients[kStep] = {};
    for (int64_t l = 0; l < count; ++l) {
      wide_x[l] = A(wide(x[j + l]));
      coefficients[l] = g.coefficient(sign_of(j + l, wide_x[l]));
    }
    if constexpr (std::is_same_v<T, bfloat16>) {  // store_pair has an order of its own
      A ordered_x[kStep], ordered[kStep];
      for (int64_t l = 0; l < kStep; ++l) {
        ordered_x[position_in_pairs<T>(l)] = wide_x[l], ordered[position_in_pairs<T>(l)] = coefficients[l];
      }
      write_gradient(load_pair(ordered_x), load_pair(ordered), g, pad);
    } else {
      write_gradient(load_pair(wide_x), load_pair(coefficients), g, pad);
    }
    std::copy(pad, pad + count, out + j);
  }
}

// The same for a 16-bit row whose distinct logits in descending order are `distinct`, those of columns that the mask
// leaves out apart, and whose signs are any number of steps, none split: a table from each of 65,536 codes to its
// gradient, one read and one write a column.
template <class T>
static inline void gradient_by_value(const T* x, int64_t n, const SignedGradient<float>& g, const Room<float>& distinct,
                                     const Steps<float>& steps, Room<T>& values, Room<T>& table, T* out) {
  const int64_t count = int64_t(distinct.size());
  values.resize(2 * count);
  table.resize(65536);
  for (int64_t i = 0; i < count; ++i) narrow(distinct[i], values[i]);
  T* const gradient = values.data() + count;
  int64_t step = 0;
  gradient_by_column(
      values.data(), count, g,
      [&](int64_t, float value) {
        while (step + 1 < steps.size() && value < steps.below[step + 1]) ++step;
        return steps.sign[step];
      },
      gradient);
  for (int64_t i = 0; i < count; ++i) {
    table[values[i].bits] = gradient[i];
    if (distinct[i] == 0) table[0] = table[0x8000] = gradient[i];
  }
  T absent;
  narrow(-INFINITY, absent);
  table[absent.bits] = T{};
  const T* const codes = table.data();
  for (int64_t j = 0; j < n; ++j) out[j] = codes[x[j].bits];
}

}  // namespace mlot::MLOT_ISA
