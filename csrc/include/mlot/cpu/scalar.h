// What one element goes through: dtypes, widening, rounding, exp. Written so that loops over it vectorise.
//
// Everything is `static inline` in a namespace per instruction set: an inline function with external linkage could be
// merged with the copy that was compiled for another one.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifndef MLOT_ISA
#error "compile with -DMLOT_ISA=baseline, avx2 or avx512"
#endif

namespace mlot {

// As bits, and not _Float16: g++ 12 leaves loops over that scalar.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace MLOT_ISA {

// What sums over elements of a dtype are made in, and what a row's scalars are kept in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

static inline float wide(float x) { return x; }
static inline double wide(double x) { return x; }

static inline float wide(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

static inline float wide(float16 x) {
  const uint32_t rest = x.bits & 0x7fffu;
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;  // exact, subnormals too
  const uint32_t bits = rest >= 0x7c00u ? (rest << 13) | 0x7f800000u : std::bit_cast<uint32_t>(magnitude);
  return std::bit_cast<float>(bits | sign);
}

// Rounds to nearest, ties to even, as torch does.
static inline void narrow(float x, float& out) { out = x; }
static inline void narrow(double x, double& out) { out = x; }

static inline void narrow(float x, bfloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

static inline void narrow(float x, float16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  // One last place of 0.5f is 2^-24, the smallest subnormal: the addition rounds to it.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
  // Masks and not conditions, whose four cases g++ leaves scalar.
  const uint32_t small = -uint32_t(rest < 0x38800000u);
  const uint32_t large = -uint32_t(rest >= 0x477ff000u);  // what rounds to 65536 or is above
  const uint32_t nan = -uint32_t(rest > 0x7f800000u);
  const uint32_t magnitude = (subnormal & small) | (normal & ~small & ~large) | (0x7c00u & large) | (0x200u & nan);
  out.bits = uint16_t(magnitude | sign);
}

// e^x for x <= 0, 1.1 last places off at most. Below -87.3, where float leaves its normal numbers, it is 0; NaN stays
// NaN.
//
// x = n log 2 + r with |r| <= log(2) / 2; e^r is a polynomial of degree 7, 2^n goes into the exponent's bits. log 2 is
// subtracted in two parts, of which the first has so few bits that n times it is exact.
static inline float exp_negative(float x) {
  constexpr float kSmallest = -87.3f;
  const float clamped = x < kSmallest ? kSmallest : x;
  const float shifted = clamped * 0x1.715476p+0f + 0x1.8p23f;  // its last bits are n: one last place of 2^23 is 1
  const float n = shifted - 0x1.8p23f;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u;
  const float e = p * std::bit_cast<float>(power);
  return x < kSmallest ? 0.f : e;
}

static inline double exp_negative(double x) { return std::exp(x); }

}  // namespace MLOT_ISA
}  // namespace mlot
