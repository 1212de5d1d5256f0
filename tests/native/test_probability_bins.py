"""Bins of logits, against numpy, on the instruction set of this process."""

from __future__ import annotations

import numpy as np
import pytest

probe = pytest.importorskip("mlot_kernels._probe", reason="built with MLOT_PROBE=1 alone")

dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
# peak, top - (x - peak) of bin 0, bins a logit; of rows that are flat, usual, far from 0, and of no width at all.
SCALES = {
    "usual": (3.25, 1.5, 170.0),
    "flat": (0.01, 0.02, 60_000.0),
    "steep": (90.0, 40.0, 3.0),
    "far from 0": (-40_000.0, 5.0, 200.0),
    "beyond float32": (0.0, 3e30, 1e-28),
    "everything in one": (1.0, 0.0, 0.0),
}
scales = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
WIDTHS = (1, 63, 64, 65, 127, 2047, 2048, 2049, 2112, 5003)
LAST = 4095


def routine(name: str, dtype: str):
    return getattr(probe, f"{name}_{dtype}")


def numbers(dtype: str, scale: tuple[float, float, float]) -> np.ndarray:
    """Ascending: logits about the bins, every exponent of either sign, and the ends."""
    generator, info = np.random.default_rng(0), np.finfo(dtype)
    peak, top, per_logit = scale
    about = peak + top - generator.uniform(-200, probe.bins + 200, 200_000) / max(per_logit, 1e-30)
    exponents = np.ldexp(generator.uniform(1, 2, info.maxexp - info.minexp), np.arange(info.minexp, info.maxexp))
    ends = [0, info.max, info.min, info.smallest_subnormal, -info.smallest_subnormal, np.inf, -np.inf]
    with np.errstate(over="ignore"):
        return np.sort(np.concatenate([about, exponents, -exponents, ends]).astype(dtype))


def logits(columns: int, dtype: str, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    generator = np.random.default_rng(columns)
    x = (generator.standard_normal(columns) * 4).astype(dtype)
    if kind == "-inf":
        x[::3] = -np.inf
    return x, np.arange(columns) % 3 > 0 if kind == "masked" else None


kinds = pytest.mark.parametrize("kind", ["usual", "-inf", "masked"])


@dtypes
@scales
def test_a_larger_logit_is_in_no_later_bin(dtype, scale):
    """Signs of whole bins rest on it: bins that overlap would compare ranks that no row has."""
    bins = routine("bins_of", dtype)(numbers(dtype, scale), scale)
    assert (np.diff(bins) <= 0).all()
    assert bins.min() >= 0
    assert bins.max() <= LAST
    assert (bins[-1], bins[0]) == (0, LAST if scale[2] > 0 else 0)


@dtypes
def test_bins_are_where_they_are_said_to_be(dtype):
    """Powers of 2, where every step is exact: top is bin 0, and a bin later for each 1 / per_logit below it."""
    steps = np.arange(-3, probe.bins + 3)
    x = (8.0 - (steps + 0.25) / 64).astype(dtype)
    expected = np.clip(steps, 0, LAST)
    np.testing.assert_array_equal(routine("bins_of", dtype)(x, (0.5, 7.5, 64.0)), expected)


@dtypes
@scales
def test_exactly_a_bins_logits_and_later_ones_are_below_its_upper_edge(dtype, scale):
    """The step that backward compares with is this number: one next to it, and a column gets its neighbour's sign."""
    bins = np.arange(1, probe.bins)
    edges = routine("upper_edges", dtype)(bins, scale)
    bins_of = routine("bins_of", dtype)
    infinity = np.array(np.inf, dtype)
    below = np.nextafter(edges, -infinity)
    some = edges > -np.inf  # else none is in the bin or later
    assert (bins_of(below[some], scale) >= bins[some]).all()
    assert (bins_of(edges, scale) < bins).all()
    assert some.all() == (scale[2] > 0)
    assert (edges[1:] <= edges[:-1]).all()


@dtypes
@scales
@kinds
def test_bins_are_counted(dtype, scale, kind):
    """On both sides of a tile of 64 columns. What is behind the row's end must not count, and what a mask leaves out
    counts in the bin of -inf."""
    for columns in WIDTHS:
        x, mask = logits(columns, dtype, kind)
        looked_at = x if mask is None else np.where(mask, x, -np.inf).astype(dtype)
        expected = np.bincount(routine("bins_of", dtype)(looked_at, scale), minlength=probe.bins)
        np.testing.assert_array_equal(routine("count_bins", dtype)(x, mask, scale), expected, err_msg=str(columns))


@dtypes
@kinds
def test_sums_over_bins_are_numpys(dtype, kind):
    """On both sides of a tile and of a chunk of 2048 columns: sums of weight p and of weight p (x - peak), without open
    bins, whose logits come back in the order of their columns, -inf not among them."""
    scale, factor = SCALES["usual"], 1.25
    generator = np.random.default_rng(1)
    weights = generator.choice([-1.0, 0.0, 1.0, probe.open_bin], probe.bins).astype(dtype)
    for columns in WIDTHS:
        x, mask = logits(columns, dtype, kind)
        looked_at = x if mask is None else np.where(mask, x, -np.inf).astype(dtype)
        below = looked_at.astype(np.float64) - scale[0]
        weight = weights.astype(np.float64)[routine("bins_of", dtype)(looked_at, scale)]
        is_open = weight == probe.open_bin
        p = np.where(is_open, 0, np.exp2(below * factor))
        finite = np.where(p > 0, below, 0)
        scale_of_error = (p * (1 + np.abs(finite))).sum()
        total, moment, found = routine("sum_bins", dtype)(x, mask, scale, factor, weights, True)
        tolerance = 4 * np.finfo(dtype).eps * scale_of_error + 1e-300
        assert abs(total - (weight * p).sum()) <= tolerance, columns
        assert abs(moment - (weight * p * finite).sum()) <= tolerance, columns
        np.testing.assert_array_equal(found, looked_at[is_open & (looked_at > -np.inf)])
        assert routine("sum_bins", dtype)(x, mask, scale, factor, weights, False)[:2] == (total, moment)
        assert not routine("sum_bins", dtype)(x, mask, scale, factor, weights, False)[2].size


@dtypes
def test_open_bins_that_are_everywhere(dtype):
    """What is found outgrows the room that was made for it."""
    x, _ = logits(50_000, dtype, "usual")
    weights = np.full(probe.bins, probe.open_bin, dtype=dtype)
    total, moment, found = routine("sum_bins", dtype)(x, None, SCALES["usual"], 1.0, weights, True)
    assert (total, moment) == (0, 0)
    np.testing.assert_array_equal(found, x)
