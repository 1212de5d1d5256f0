"""The terms of a divergence for a tile of columns of two rows, and what each adds to the gradient.

With p and q the teacher's and the student's probabilities, d = log(p / q), m a mixture of both. H = dloss/dlog p is
written as H' + kappa p, for the student as H' - kappa q, and H' is exactly 0 where p = q; README.md has the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

EXACT = {"enable_fp_fusion": False}
"""In every launch: a product that is fused into the difference of two equal ones leaves its rounding there, not 0."""

_NEAR: tl.constexpr = tl.constexpr(-0.35)  # up to here e^x - 1 loses two bits


class Constants(NamedTuple):
    """What the terms of a pair of rows need beside its log-probabilities."""

    q_scale: Any  # exp of the log scale
    p_scale: Any
    more: Any  # the teacher's log scale less the student's
    weight: Any  # of p in the mixture
    share: Any  # of adaptive_kl: of the forward part
    skew: Any  # of the skewed kinds
    kappa: Any
    floor: Any  # what smaller probabilities count as; used, as are the next three, under FLOORS
    log_floor: Any
    q_log_scale: Any
    p_log_scale: Any


@triton.jit
def expm1_negative(x):
    """e^x - 1 for x <= 0, to a few last places of the result, and e^x."""
    e = tl.exp(x)
    # e^x - 1 = x (1 + x/2 (1 + x/3 (..))); the first term left out is below the last place where x is near 0.
    COUNT: tl.constexpr = 13 if x.dtype == tl.float64 else 7
    small = tl.maximum(x, _NEAR)
    one = tl.full([], 1.0, x.dtype)
    series = 1.0 + small * (1.0 / COUNT)
    for i in tl.static_range(2, COUNT):
        series = tl.fma(small * (1.0 / (COUNT + 1 - i)), series, one)
    return tl.where(x > _NEAR, x * series, e - 1.0), e


@triton.jit
def times(p, x):
    """p x, 0 where p is."""
    return tl.where(p == 0, p, p * x)


@triton.jit
def over_mixture(d, weight):
    """log(p / m) and log(q / m) for m = weight p + (1 - weight) q; 0 where d is."""
    larger = d > 0  # p, else q
    fall, e = expm1_negative(-tl.abs(d))
    of_smaller = tl.where(larger, 1.0 - weight, weight)
    less = of_smaller * fall
    near = less > -0.5
    # m over the larger one; written as 1 + less it would cancel where it is small, and else loses what is added back.
    m = tl.where(near, 1.0 + less, (1.0 - of_smaller) + of_smaller * e)
    lost = tl.where(near, (m - 1.0) - less, 0.0)
    log_m = tl.log(m) - lost / m
    return tl.minimum(d, 0.0) - log_m, tl.minimum(-d, 0.0) - log_m


@triton.jit
def skewed(x, y, log_ratio, skew):
    """x log(x / m), where ``log_ratio`` is log(x / m) for m = skew x + (1 - skew) y, and H' of the sides of x and y."""
    fall, e = expm1_negative(-tl.abs(log_ratio))
    ratio = tl.where(log_ratio > 0, -fall / e, fall)  # x / m - 1, and x / m is at most 1 / skew
    term = times(x, log_ratio)
    return term, term - times(x, skew * ratio), -times(y, (1.0 - skew) * ratio)


@triton.jit
def terms(log_q, log_p, constants, KIND: tl.constexpr, WHOLE: tl.constexpr, FLOORS: tl.constexpr):
    """A tile's terms of the loss, and H of the student and of the teacher, from logs of their softmax.

    WHOLE, where every column meets: the terms are made 0 or more, and H is H'. FLOORS: what is below the floor, which
    NaN is not, counts as the floor, and its H is 0. -inf on both sides adds nothing.
    """
    q = tl.exp(log_q) * constants.q_scale
    p = tl.exp(log_p) * constants.p_scale
    apart = (log_p - log_q) + constants.more
    if FLOORS:
        low_q = q < constants.floor
        low_p = p < constants.floor
        q = tl.where(low_q, constants.floor, q)
        p = tl.where(low_p, constants.floor, p)
        at_q = tl.where(low_q, constants.log_floor, log_q + constants.q_log_scale)
        apart = tl.where(low_p, constants.log_floor, log_p + constants.p_log_scale) - at_q
    d = tl.where(p + q == 0, 0.0, apart)
    if KIND == "forward_kl":
        term = times(p, d)
        of_q, of_p = q - p, term
    elif KIND == "reverse_kl":
        term = times(q, -d)
        of_q, of_p = term, p - q
    elif KIND == "total_variation":
        half = (p - q) * 0.5
        term = tl.abs(half)
        sign = tl.where(half == 0, 0.0, tl.where(half < 0, -0.5, 0.5)) + (half - half)  # NaN stays
        of_q, of_p = -sign * q, sign * p
    elif KIND == "adaptive_kl":
        share = constants.share
        rest = 1.0 - share
        forward = times(p, d)
        reverse = times(q, -d)
        term = share * forward + rest * reverse
        of_q = share * (q - p) + rest * reverse
        of_p = share * forward + rest * (p - q)
    elif KIND == "jsd":
        u, v = over_mixture(d, constants.weight)
        of_q = (1.0 - constants.weight) * times(q, v)
        of_p = constants.weight * times(p, u)
        term = of_q + of_p
    elif KIND == "skew_kl":
        u, _v = over_mixture(d, constants.weight)
        term, of_p, of_q = skewed(p, q, u, constants.skew)
    else:
        _u, v = over_mixture(d, constants.weight)
        term, of_q, of_p = skewed(q, p, v, constants.skew)
    if WHOLE:
        # Written as fma, for LLVM's vectorizer crashes on the separate operations (Triton 3.9, sm_90, skew_kl).
        term = tl.fma(constants.kappa, q - p, term)
    else:
        of_q -= constants.kappa * q
        of_p += constants.kappa * p
    if FLOORS:
        of_q = tl.where(low_q, 0.0, of_q)
        of_p = tl.where(low_p, 0.0, of_p)
    return term, of_q, of_p
