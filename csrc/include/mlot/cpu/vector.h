// Vectors of the widest registers of the instruction set: loads that widen, stores that round, 2^t, logs, sums in one
// order.
//
// Loops over these, and not loops left to the compiler, where the order of a sum is part of the contract: it depends
// neither on where a row starts in memory nor on how long it is.
#pragma once

#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "mlot/cpu/scalar.h"

namespace mlot::MLOT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define MLOT_INLINE static inline __attribute__((always_inline))

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
using VectorBits = typename VectorOf<A>::bits;
template <class A>
constexpr int kWidth = kVectorBytes / int(sizeof(A));

template <class A>
MLOT_INLINE Vector<A> all(A value) {
  return value - Vector<A>{};
}

// Any alignment.
template <class A>
MLOT_INLINE Vector<A> load(const A* x) {
  Vector<A> v;
  __builtin_memcpy(&v, x, sizeof(v));
  return v;
}

template <class A>
MLOT_INLINE void store(Vector<A> v, A* out) {
  __builtin_memcpy(out, &v, sizeof(v));
}

// 2 kWidth neighbouring elements, widened, in an order of their own: where two bfloat16 share 32 bits, one vector holds
// the first ones and the other the second ones, which is one instruction each and no shuffle.
template <class A>
struct Pair {
  Vector<A> part[2];
};

// Any alignment.
template <class A>
  requires(sizeof(A) >= 4)
MLOT_INLINE Pair<A> load_pair(const A* x) {
  Vector<A> first, second;  // one copy of both would go through memory
  __builtin_memcpy(&first, x, sizeof(first));
  __builtin_memcpy(&second, x + kWidth<A>, sizeof(second));
  return {{first, second}};
}

MLOT_INLINE Pair<float> load_pair(const bfloat16* x) {
  VectorBits<float> both;
  __builtin_memcpy(&both, x, sizeof(both));
  return {{std::bit_cast<Vector<float>>(both << 16), std::bit_cast<Vector<float>>(both & 0xffff0000u)}};
}

MLOT_INLINE Pair<float> load_pair(const float16* x) {
  Pair<float> v;
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const float16* half = x + h * kWidth<float>;
#if defined(__AVX512F__)
    v.part[h] = (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)half));
#elif defined(__AVX2__)
    v.part[h] = (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)half));
#else
    for (int l = 0; l < kWidth<float>; ++l) v.part[h][l] = wide(half[l]);
#endif
  }
  return v;
}

// Where the element at `offset` of the row of vectors that load_pair gives for whole tiles of T is among them.
template <class T>
MLOT_INLINE int64_t position_in_pairs(int64_t offset) {
  if constexpr (!std::is_same_v<T, bfloat16>) return offset;
  constexpr int64_t kBoth = 2 * kWidth<float>;
  const int64_t inside = offset % kBoth;
  return offset - inside + inside % 2 * kWidth<float> + inside / 2;
}

// The reverse of load_pair, each element rounded as `narrow` rounds it.
template <class A>
  requires(sizeof(A) >= 4)
MLOT_INLINE void store_pair(Pair<A> v, A* out) {
  __builtin_memcpy(out, &v.part[0], sizeof(v.part[0]));
  __builtin_memcpy(out + kWidth<A>, &v.part[1], sizeof(v.part[1]));
}

MLOT_INLINE VectorBits<float> rounded_bits(Vector<float> v) {  // of no NaN
  const auto bits = std::bit_cast<VectorBits<float>>(v);
  return bits + 0x7fffu + (bits >> 16 & 1u);
}

MLOT_INLINE void store_pair_without_nan(Pair<float> v, bfloat16* out) {
  const auto both = rounded_bits(v.part[0]) >> 16 | (rounded_bits(v.part[1]) & 0xffff0000u);
  __builtin_memcpy(out, &both, sizeof(both));
}

MLOT_INLINE void store_pair(Pair<float> v, bfloat16* out) {
  for (int h = 0; h < 2; ++h) {
    const auto nan = VectorBits<float>(v.part[h] != v.part[h]);
    const auto bits = (std::bit_cast<VectorBits<float>>(v.part[h]) & ~nan) | (0x7fc00000u & nan);
    v.part[h] = std::bit_cast<Vector<float>>(bits);
  }
  store_pair_without_nan(v, out);
}

MLOT_INLINE void store_pair(Pair<float> v, float16* out) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    float16* half = out + h * kWidth<float>;
#if defined(__AVX512F__)
    constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256((__m256i*)half, _mm512_maskz_cvtps_ph(0xffff, (__m512)v.part[h], kRounding));
#elif defined(__AVX2__)
    constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128((__m128i*)half, _mm256_cvtps_ph((__m256)v.part[h], kRounding));
#else
    for (int l = 0; l < kWidth<float>; ++l) narrow(v.part[h][l], half[l]);
#endif
  }
}

// The larger of two, element by element; where one is NaN, b. A comparison would be two instructions.
MLOT_INLINE Vector<float> larger(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vector<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

MLOT_INLINE Vector<double> larger(Vector<double> a, Vector<double> b) { return a > b ? a : b; }

constexpr double kLog2E = 1.4426950408889634;

// 2^t on r in [-1/2, 1/2] is a polynomial with p(0) = 1; its coefficients from r on.
template <class A>
struct Exp2;
template <>
struct Exp2<float> {  // the best relative error for degree 5, 9.2e-8
  static constexpr float coefficients[] = {0.693146977597678f, 0.24022242083111872f, 0.05550733744471248f,
                                           0.009671512785773662f, 0.0013264727252627287f};
  static constexpr float magic = 0x1.8p23f + 127;  // added, it leaves the exponent of 2^t in the last bits of the sum
  static constexpr float smallest = -127;          // whose exponent is that of 0
  static constexpr int mantissa = 23;
};
template <>
struct Exp2<double> {  // log(2)^i / i!; what follows is below 5e-18
  static constexpr double coefficients[] = {0.6931471805599453,     0.2402265069591007,     0.055504108664821576,
                                            0.009618129107628477,   0.0013333558146428441,  0.00015403530393381606,
                                            1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07,
                                            7.054911620801121e-09,  4.44553827187081e-10,   2.5678435993488196e-11,
                                            1.3691488853904124e-12};
  static constexpr double magic = 0x1.8p52 + 1023;
  static constexpr double smallest = -1023;
  static constexpr int mantissa = 52;
};

// t at least so large that 2^t is defined here: 0 at and below Exp2::smallest. NaN stays NaN.
template <class A>
MLOT_INLINE Vector<A> at_least_smallest(Vector<A> t) {
  return larger(all(Exp2<A>::smallest), t);
}

// 2^t for smallest <= t <= 0; 0 where that is no normal number. NaN stays NaN. Error: 1.3e-7 (float), 3e-16 (double)
// times the result.
template <class A>
MLOT_INLINE Vector<A> exp2_negative(Vector<A> t) {
  constexpr int n = int(sizeof(Exp2<A>::coefficients) / sizeof(A));
  const Vector<A> shifted = t + Exp2<A>::magic;
  const Vector<A> r = t - (shifted - Exp2<A>::magic);
  Vector<A> p = all(Exp2<A>::coefficients[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) p = p * r + Exp2<A>::coefficients[i];
  p = p * r + A(1);
  return p * std::bit_cast<Vector<A>>(std::bit_cast<VectorBits<A>>(shifted) << Exp2<A>::mantissa);
}

// log(2^k m) with m in [sqrt(1/2), sqrt(2)) is k log 2 + f - f^2 / 2 + s (f^2 / 2 + z L(z)) for f = m - 1,
// s = f / (2 + f) and z = s^2 <= 0.0295. L's coefficients, from 1 on, have the smallest largest error. log 2 comes in
// two parts, of which the first has so few bits that k times it is exact.
template <class A>
struct Log;
template <>
struct Log<float> {  // changes log m by 9e-10 of it
  static constexpr float coefficients[] = {0.6666677638278882f, 0.3997754145534353f, 0.298717306201652f};
  static constexpr float high = 0.693359375f, low = -2.1219444005469057e-4f;
  static constexpr float smallest = 0x1p-126f;  // of the normal numbers
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct Log<double> {  // by 2e-18
  static constexpr double coefficients[] = {0.6666666666666734,  0.3999999999941466,  0.28571428742392563,
                                            0.22222198572680668, 0.18183564351284365, 0.15314049939920912,
                                            0.14795955513196996};
  static constexpr double high = 0x1.62e42feep-1, low = 1.9082149292705877e-10;
  static constexpr double smallest = 0x1p-1022;
  static constexpr int mantissa = 52, bias = 1023;
};

// log x for every x, as std::log has it: of subnormal numbers, too; -inf at either 0, NaN below, inf and NaN at
// themselves. Error: 0.85 last places (float), 0.87 (double).
template <class A>
MLOT_INLINE Vector<A> logarithm(Vector<A> x) {
  using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  constexpr int n = int(sizeof(Log<A>::coefficients) / sizeof(A)), mantissa = Log<A>::mantissa;
  constexpr A magic = A(Bits(1) << mantissa);  // added, it leaves an integer in the last bits of the sum
  constexpr Bits one = std::bit_cast<Bits>(A(1)), least = std::bit_cast<Bits>(A(0.7071067811865476));
  const auto subnormal = x < Log<A>::smallest;
  const Vector<A> normal = subnormal ? x * magic : x;
  // k's bits, and below them how far m's are from those of sqrt(1/2).
  const VectorBits<A> parts = std::bit_cast<VectorBits<A>>(normal) + (one - least);
  const Vector<A> exponent = std::bit_cast<Vector<A>>(parts >> mantissa | std::bit_cast<Bits>(magic));
  const Vector<A> k = exponent - (subnormal ? all(magic + Log<A>::bias + mantissa) : all(magic + Log<A>::bias));
  const Vector<A> f = std::bit_cast<Vector<A>>((parts & ((Bits(1) << mantissa) - 1)) + least) - A(1);
  const Vector<A> s = f / (f + A(2)), z = s * s, half_square = f * f * A(0.5);
  Vector<A> L = all(Log<A>::coefficients[n - 1]);
#pragma GCC unroll 8
  for (int i = n - 2; i >= 0; --i) L = L * z + Log<A>::coefficients[i];
  const Vector<A> rest = s * (half_square + z * L) + k * Log<A>::low;
  const Vector<A> log = k * Log<A>::high - (half_square - rest - f);
  const Vector<A> at_most_0 = x == A(0) ? all(A(-INFINITY)) : all(A(NAN));
  const Vector<A> finite = x > A(0) ? log : at_most_0;
  return x < A(INFINITY) ? finite : x;
}

// Where the elements are known to be no NaN, which only bfloat16 takes care of by itself.
template <class T>
MLOT_INLINE void store_pair_without_nan(Pair<Accumulator<T>> v, T* out) {
  store_pair(v, out);
}

template <class A>
MLOT_INLINE A sum(Vector<A> v) {  // pairs of halves, in this order
  for (int width = kWidth<A> / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) v[l] += v[l + width];
  }
  return v[0];
}

// Whether a bit is set.
template <class A>
MLOT_INLINE bool any(VectorBits<A> v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  auto bits = v[0];
#pragma GCC unroll 16
  for (int l = 1; l < kWidth<A>; ++l) bits |= v[l];
  return bits != 0;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Of 8 lanes, those whose bits are set, one behind the other.
struct ChosenLanes {
  uint8_t lanes[256][8] = {};
  constexpr ChosenLanes() {
    for (int chosen = 0; chosen < 256; ++chosen) {
      int n = 0;
      for (int l = 0; l < 8; ++l) {
        if (chosen >> l & 1) lanes[chosen][n++] = uint8_t(l);
      }
    }
  }
};
constexpr ChosenLanes kChosenLanes;
#endif

// Writes the elements where all bits of `chosen` are set, one behind the other, and kWidth elements in all; returns
// how many they are.
template <class A>
MLOT_INLINE int64_t store_chosen(Vector<A> v, VectorBits<A> chosen, A* out) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const int lanes = _mm256_movemask_ps((__m256)chosen);  // of 32 bits: two for each double
  const __m128i order = _mm_loadl_epi64((const __m128i*)kChosenLanes.lanes[lanes]);
  store<A>((Vector<A>)_mm256_permutevar8x32_ps((__m256)v, _mm256_cvtepu8_epi32(order)), out);
  return __builtin_popcount(unsigned(lanes)) * int64_t(sizeof(float)) / int64_t(sizeof(A));
#else
  int64_t n = 0;
  for (int l = 0; l < kWidth<A>; ++l) {
    out[n] = v[l];
    n += chosen[l] != 0;
  }
  return n;
#endif
}

template <class A>
MLOT_INLINE A largest(Vector<A> v) {  // of no NaN
  A m = v[0];
  for (int l = 1; l < kWidth<A>; ++l) m = v[l] > m ? v[l] : m;
  return m;
}

}  // namespace mlot::MLOT_ISA
