// The terms of a divergence for a chunk of columns of two rows, and what each adds to the gradient.
//
// With p and q the teacher's and the student's probabilities, d = log(p / q), m a mixture of both. H = dloss/dlog p is
// written as H' + kappa p, and H' is exactly 0 where p = q; mlot_kernels/ops/row_divergence/README.md has the formulas.
// Under a floor what is smaller counts as the floor, and its H is 0. Where both are smaller, as where columns are left
// out, that adds exactly nothing.
#pragma once

#include "mlot/cpu/vector.h"
#include "mlot/divergence.h"

namespace mlot::MLOT_ISA {

constexpr int64_t kTermColumns = 1024;  // of a chunk: its buffers stay in the L1 cache

// Side 0 is the student, 1 the teacher. Columns behind the last one, up to a whole vector, are -inf.
template <class B>
struct TermChunk {
  alignas(kVectorBytes) B log_softmax[2][kTermColumns];  // of the whole row; -inf where the columns do not meet
  alignas(kVectorBytes) B softmax[2][kTermColumns];      // made of it
  alignas(kVectorBytes) B H[2][kTermColumns];
  alignas(kVectorBytes) B difference[kTermColumns];  // |p - q|
};

template <class B>
struct TermOptions {
  B scale[2];  // exp of the log scale
  B more;      // the teacher's log scale less the student's
  B weight;    // of p in the mixture
  B share;     // of adaptive_kl: of the forward part
  B skew;      // of the skewed kinds
  B kappa;     // what the teacher's H has beside H' in p, the student's in -q; 0 to leave it out
  B balance;   // of q - p in each term, which makes them 0 or more where it adds up to nothing
  // Of the terms with floors alone:
  B floor, log_floor;
  B log_scale[2];
};

// e^x - 1 for x <= 0, to a few last places of the result.
template <class B>
MLOT_INLINE Vector<B> expm1_negative(Vector<B> x) {
  constexpr int n = int(sizeof(Exp2<B>::coefficients) / sizeof(B));
  const Vector<B> t = at_least_smallest<B>(x * B(kLog2E)), shifted = t + Exp2<B>::magic;
  const Vector<B> r = t - (shifted - Exp2<B>::magic);
  Vector<B> p = all(Exp2<B>::coefficients[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) p = p * r + Exp2<B>::coefficients[i];
  const auto power = std::bit_cast<Vector<B>>(std::bit_cast<VectorBits<B>>(shifted) << Exp2<B>::mantissa);
  return p * r * power + (power - B(1));
}

// `x`, for which the compiler may not put the multiplication that made it: equal products are to differ by 0.
template <class B>
MLOT_INLINE Vector<B> rounded(Vector<B> x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// p x, 0 where p is.
template <class B>
MLOT_INLINE Vector<B> times(Vector<B> p, Vector<B> x) {
  return p == B(0) ? p : p * x;
}

// log(p / m) and log(q / m) for m = weight p + (1 - weight) q; 0 where d is.
template <class B>
MLOT_INLINE void over_mixture(Vector<B> d, B weight, Vector<B>& of_p, Vector<B>& of_q) {
  const Vector<B> zero = {}, down = d > zero ? -d : d;
  const Vector<B> of_smaller = d > zero ? all(B(1) - weight) : all(weight), of_larger = B(1) - of_smaller;
  const Vector<B> fall = expm1_negative<B>(down), less = of_smaller * fall;
  const auto near = less > B(-0.5);
  // m over the larger one; written as 1 + less it would cancel where it is small, and else loses what is added back.
  const Vector<B> m = near ? B(1) + less : of_larger + of_smaller * (B(1) + fall);
  const Vector<B> lost = near ? (m - B(1)) - less : zero;
  const Vector<B> log_m = logarithm<B>(m) - lost / m;
  of_p = (d > zero ? zero : d) - log_m;
  of_q = (d > zero ? -d : zero) - log_m;
}

template <class B>
struct TermSums {
  B loss, H[2];
};

// Makes softmax and H of a chunk of `columns` columns; returns the sums of the loss's terms and of H.
template <DivergenceKind kKind, bool kFloors, class B>
static TermSums<B> add_terms(TermChunk<B>& chunk, int64_t columns, const TermOptions<B>& given) {
  using enum DivergenceKind;
  const TermOptions<B> o = given;  // a copy, which what is written cannot change
  Vector<B> loss = {}, sum_q = {}, sum_p = {};
  for (int64_t j = 0; j < columns; j += kWidth<B>) {
    const Vector<B> log_q = load(chunk.log_softmax[0] + j), log_p = load(chunk.log_softmax[1] + j);
    const Vector<B> softmax_q = exp2_negative<B>(at_least_smallest<B>(log_q * B(kLog2E)));
    const Vector<B> softmax_p = exp2_negative<B>(at_least_smallest<B>(log_p * B(kLog2E)));
    Vector<B> q = rounded<B>(softmax_q * o.scale[0]), p = rounded<B>(softmax_p * o.scale[1]);
    Vector<B> apart = (log_p - log_q) + o.more;
    const auto low_q = q < o.floor, low_p = p < o.floor;  // NaN is not, and stays
    if constexpr (kFloors) {
      const Vector<B> at_q = low_q ? all(o.log_floor) : log_q + o.log_scale[0];
      const Vector<B> at_p = low_p ? all(o.log_floor) : log_p + o.log_scale[1];
      apart = at_p - at_q;
      q = low_q ? all(o.floor) : q, p = low_p ? all(o.floor) : p;
    }
    const Vector<B> both = p + q, zero = {};
    const Vector<B> d = both == zero ? zero : apart;
    Vector<B> term, of_p, of_q;
    if constexpr (kKind == forward_kl) {
      term = of_p = times<B>(p, d), of_q = q - p;
    } else if constexpr (kKind == reverse_kl) {
      term = of_q = times<B>(q, -d), of_p = p - q;
    } else if constexpr (kKind == total_variation) {
      const Vector<B> half = (p - q) * B(0.5);
      term = half < zero ? -half : half;
      const Vector<B> sign = (half == zero ? zero : (half < zero ? all(B(-0.5)) : all(B(0.5)))) + (half - half);  // NaN
      of_p = sign * p, of_q = -sign * q;
    } else if constexpr (kKind == adaptive_kl) {
      const Vector<B> forward = times<B>(p, d), reverse = times<B>(q, -d);
      term = o.share * forward + (B(1) - o.share) * reverse;
      of_p = o.share * forward + (B(1) - o.share) * (p - q);
      of_q = o.share * (q - p) + (B(1) - o.share) * reverse;
    } else {
      Vector<B> u, w;  // log(p / m), log(q / m)
      over_mixture<B>(d, o.weight, u, w);
      if constexpr (kKind == jsd) {
        of_p = o.weight * times<B>(p, u), of_q = (B(1) - o.weight) * times<B>(q, w), term = of_p + of_q;
      } else {  // x / m - 1, where x / m has a bound of 1 / skew
        const bool of_teacher = kKind == skew_kl;
        const Vector<B> x = of_teacher ? p : q, y = of_teacher ? q : p, log_ratio = of_teacher ? u : w;
        const Vector<B> fall = expm1_negative<B>(log_ratio > zero ? -log_ratio : log_ratio);
        const Vector<B> ratio = log_ratio > zero ? -fall / (B(1) + fall) : fall;
        term = times<B>(x, log_ratio);
        const Vector<B> own = term - times<B>(x, o.skew * ratio), other = -times<B>(y, (B(1) - o.skew) * ratio);
        of_p = of_teacher ? own : other, of_q = of_teacher ? other : own;
      }
    }
    of_q -= o.kappa * q, of_p += o.kappa * p;
    if constexpr (kFloors) of_q = low_q ? zero : of_q, of_p = low_p ? zero : of_p;
    loss += term + o.balance * (q - p), sum_q += of_q, sum_p += of_p;
    if constexpr (kKind == adaptive_kl) store<B>(p < q ? q - p : p - q, chunk.difference + j);
    store<B>(softmax_q, chunk.softmax[0] + j), store<B>(softmax_p, chunk.softmax[1] + j);
    store<B>(of_q, chunk.H[0] + j), store<B>(of_p, chunk.H[1] + j);
  }
  return {sum<B>(loss), {sum<B>(sum_q), sum<B>(sum_p)}};
}

template <class B>
using AddTerms = TermSums<B> (*)(TermChunk<B>&, int64_t, const TermOptions<B>&);

template <class B, bool kFloors>
static inline AddTerms<B> terms_of(DivergenceKind kind) {
  using enum DivergenceKind;
  switch (kind) {
    case forward_kl:
      return add_terms<forward_kl, kFloors, B>;
    case reverse_kl:
      return add_terms<reverse_kl, kFloors, B>;
    case jsd:
      return add_terms<jsd, kFloors, B>;
    case total_variation:
      return add_terms<total_variation, kFloors, B>;
    case skew_kl:
      return add_terms<skew_kl, kFloors, B>;
    case skew_reverse_kl:
      return add_terms<skew_reverse_kl, kFloors, B>;
    default:
      return add_terms<adaptive_kl, false, B>;
  }
}

}  // namespace mlot::MLOT_ISA
