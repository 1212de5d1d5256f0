// The terms of a divergence for two columns that meet, and what each adds to the gradient.
//
// With p and q the teacher's and the student's probabilities, d = log(p / q), m a mixture of both. H = dloss/dlog p is
// written as H' + kappa p, and H' is exactly 0 where p = q; mlot_kernels/ops/row_divergence/README.md has the formulas.
#pragma once

#include <cmath>
#include <type_traits>

#include "mlot/cuda/device.h"
#include "mlot/divergence.h"

namespace mlot::cuda {

__device__ inline float exp_less_1(float x) { return expm1f(x); }
__device__ inline double exp_less_1(double x) { return expm1(x); }
__device__ inline float log_of_1_and(float x) { return log1pf(x); }
__device__ inline double log_of_1_and(double x) { return log1p(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// Side 0 is the student, 1 the teacher.
template <class B>
struct TermOptions {
  B scale[2];  // exp of the log scale
  B more;      // the teacher's log scale less the student's
  B weight;    // of p in the mixture; of adaptive_kl: the share of the forward part
  B kappa;     // what the teacher's H has beside H' in p, the student's in -q; 0 to leave it out
  B balance;   // of q - p in each term, which makes them 0 or more where it adds up to nothing
  // Of the kernels with floors alone:
  B floor, log_floor;
  B log_scale[2];
};

template <class B>
struct Term {
  B loss, H[2];
};

// Calls use(k) with an integral constant of the kind.
template <class Use>
__device__ inline void with_kind(DivergenceKind kind, Use use) {
  using Kind = DivergenceKind;
  switch (kind) {
    case Kind::forward_kl:
      return use(std::integral_constant<Kind, Kind::forward_kl>());
    case Kind::reverse_kl:
      return use(std::integral_constant<Kind, Kind::reverse_kl>());
    case Kind::jsd:
      return use(std::integral_constant<Kind, Kind::jsd>());
    case Kind::total_variation:
      return use(std::integral_constant<Kind, Kind::total_variation>());
    case Kind::skew_kl:
      return use(std::integral_constant<Kind, Kind::skew_kl>());
    case Kind::skew_reverse_kl:
      return use(std::integral_constant<Kind, Kind::skew_reverse_kl>());
    default:
      return use(std::integral_constant<Kind, Kind::adaptive_kl>());
  }
}

// p x, 0 where p is.
template <class B>
__device__ inline B times(B p, B x) {
  return p == B(0) ? p : p * x;
}

// log(p / m) and log(q / m) for m = weight p + (1 - weight) q; 0 where d is.
template <class B>
__device__ inline void over_mixture(B d, B weight, B& of_p, B& of_q) {
  const B of_smaller = d > B(0) ? B(1) - weight : weight, of_larger = B(1) - of_smaller;
  const B fall = exp_less_1(d > B(0) ? -d : d), less = of_smaller * fall;
  // m over the larger one; where it is small 1 + less would cancel.
  const B log_m = less > B(-0.5) ? log_of_1_and(less) : logarithm(of_larger + of_smaller * (B(1) + fall));
  of_p = (d > B(0) ? B(0) : d) - log_m;
  of_q = (d > B(0) ? -d : B(0)) - log_m;
}

template <DivergenceKind kKind, class B>
__device__ inline Term<B> term_of(B q, B p, B d, const TermOptions<B>& o) {
  using Kind = DivergenceKind;
  B term, of_p, of_q;
  if constexpr (kKind == Kind::forward_kl) {
    term = of_p = times(p, d), of_q = q - p;
  } else if constexpr (kKind == Kind::reverse_kl) {
    term = of_q = times(q, -d), of_p = p - q;
  } else if constexpr (kKind == Kind::total_variation) {
    const B half = (p - q) * B(0.5), nothing = half - half;  // NaN where half is
    const B sign = half > B(0) ? B(0.5) : half < B(0) ? B(-0.5) : nothing;
    term = half < B(0) ? -half : half;
    of_p = sign * p, of_q = -sign * q;
  } else if constexpr (kKind == Kind::adaptive_kl) {
    const B forward = times(p, d), reverse = times(q, -d), rest = B(1) - o.weight;
    term = o.weight * forward + rest * reverse;
    of_p = o.weight * forward + rest * (p - q);
    of_q = o.weight * (q - p) + rest * reverse;
  } else {
    B u, w;  // log(p / m), log(q / m)
    over_mixture(d, o.weight, u, w);
    if constexpr (kKind == Kind::jsd) {
      of_p = o.weight * times(p, u), of_q = (B(1) - o.weight) * times(q, w), term = of_p + of_q;
    } else {
      constexpr bool kOfTeacher = kKind == Kind::skew_kl;
      const B x = kOfTeacher ? p : q, y = kOfTeacher ? q : p, log_ratio = kOfTeacher ? u : w;
      const B ratio = exp_less_1(log_ratio);  // x / m - 1, where x / m has a bound of 1 / skew
      term = times(x, log_ratio);
      const B skew = kOfTeacher ? o.weight : B(1) - o.weight;
      const B own = term - times(x, skew * ratio), other = -times(y, (B(1) - skew) * ratio);
      of_p = kOfTeacher ? own : other, of_q = kOfTeacher ? other : own;
    }
  }
  return {term + o.balance * (q - p), {of_q - o.kappa * q, of_p + o.kappa * p}};
}

}  // namespace mlot::cuda
