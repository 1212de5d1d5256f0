"""Every 16-bit pattern, every rounding neighbourhood and every float32 exponent through the torch-free routines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

probe = pytest.importorskip("mlot_kernels._probe", reason="built by MLOT_PROBE=1, as make does")

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PATTERNS = np.arange(1 << 16, dtype=np.uint16)
halves = pytest.mark.parametrize("name", HALVES)

# Largest errors, in last places of the result; the tests say so where one becomes larger.
EXP_NEGATIVE_ULP = 1.1
EXP2_NEGATIVE_ULP = 2.2
EXP2_NEGATIVE_DOUBLE_ULP = 1.60
LOGARITHM_ULP = 0.85
LOGARITHM_DOUBLE_ULP = 0.87


def as_half(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(dtype)


def bits_of(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


def rounding_neighbourhoods(dtype: torch.dtype) -> np.ndarray:
    """float32 at every value of ``dtype``, at every midpoint of two, and one last place to each side of both."""
    finite = as_half(PATTERNS, dtype).double()
    finite = finite[finite.isfinite()].unique()
    beyond = finite[-1] + (finite[-1] - finite[-2])  # the next one, if there were infinitely many
    steps = torch.cat([-beyond[None], finite, beyond[None]])
    points = torch.cat([steps, (steps[1:] + steps[:-1]) / 2]).float().numpy()
    around = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    )
    others = np.array([np.inf, -np.inf, np.nan, -0.0, 3e38, -3e38, 1e-45], dtype=np.float32)
    all_ = np.concatenate([around, others])
    return np.concatenate([all_, np.zeros(-all_.size % 64, np.float32)])


def every_exponent(dtype: type) -> np.ndarray:
    """Negative numbers: 4096 mantissas in each of the exponents, subnormal numbers and both ends among them."""
    bits, integer = (23, np.uint32) if dtype is np.float32 else (52, np.uint64)
    exponents = 255 if dtype is np.float32 else 2047
    steps = np.linspace(0, (1 << bits) - 1, 4096).astype(integer)
    patterns = (np.arange(exponents, dtype=integer)[:, None] << integer(bits)) + steps
    return -patterns.view(dtype).ravel()


def last_places(ours: np.ndarray, truth: np.ndarray) -> np.ndarray:
    last_place = np.spacing(np.abs(truth).astype(ours.dtype))
    return np.abs(ours.astype(np.longdouble) - truth) / last_place.astype(np.longdouble)


@halves
@pytest.mark.parametrize("routine", ["wide", "load_pair"])
def test_every_pattern_widens_as_in_torch(name, routine):
    ours = getattr(probe, f"{routine}_{name}")(PATTERNS)
    np.testing.assert_array_equal(ours, as_half(PATTERNS, HALVES[name]).float().numpy())


@halves
@pytest.mark.parametrize("routine", ["narrow", "store_pair"])
def test_every_rounding_neighbourhood_narrows_as_in_torch(name, routine):
    x = rounding_neighbourhoods(HALVES[name])
    ours = as_half(getattr(probe, f"{routine}_{name}")(x), HALVES[name])
    truth = torch.from_numpy(x).to(HALVES[name])
    assert torch.equal(ours.isnan(), truth.isnan())
    number = ~truth.isnan()
    np.testing.assert_array_equal(bits_of(ours[number]), bits_of(truth[number]))


@halves
def test_every_pattern_survives_both_ways(name):
    back = getattr(probe, f"store_pair_{name}")(getattr(probe, f"load_pair_{name}")(PATTERNS))
    number = ~as_half(PATTERNS, HALVES[name]).isnan().numpy()
    np.testing.assert_array_equal(back[number], PATTERNS[number])


def test_exp_negative_over_every_exponent():
    x = every_exponent(np.float32)
    x, below = x[x >= -87.3], x[x < -87.3]
    truth = np.exp(x.astype(np.longdouble))
    assert last_places(probe.exp_negative(padded(x))[: x.size], truth).max() <= EXP_NEGATIVE_ULP
    assert (probe.exp_negative(padded(below))[: below.size] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "routine", "smallest", "bound"),
    [
        (np.float32, "exp2_negative", -126, EXP2_NEGATIVE_ULP),
        (np.float64, "exp2_negative_double", -1022, EXP2_NEGATIVE_DOUBLE_ULP),
    ],
)
def test_exp2_negative_over_every_exponent(dtype, routine, smallest, bound):
    t = every_exponent(dtype)
    normal, below = t[t >= smallest], t[t <= smallest - 1]
    truth = np.exp2(normal.astype(np.longdouble))
    assert last_places(getattr(probe, routine)(padded(normal))[: normal.size], truth).max() <= bound
    assert (getattr(probe, routine)(padded(below))[: below.size] == 0).all()


@pytest.mark.parametrize("routine", ["exp_negative", "exp2_negative", "exp2_negative_double"])
def test_the_ends(routine):
    dtype = np.float64 if routine.endswith("double") else np.float32
    x = padded(np.array([0, -0.0, -np.inf, np.nan], dtype=dtype))
    np.testing.assert_array_equal(getattr(probe, routine)(x)[:4], np.array([1, 1, 0, np.nan], dtype=dtype))


def about_1(dtype: type) -> np.ndarray:
    """Where a log is small and its terms are not: every neighbour of 1 at hand, and the ends of the mantissas."""
    info, steps = np.finfo(dtype), np.arange(1, 100_001)
    ends = np.sqrt(np.array([0.5, 2], dtype))[:, None] * (1 + info.eps * np.arange(-1000, 1001))
    everywhere = np.linspace(0.7, 1.42, 500_001)
    return np.concatenate([1 + info.eps * steps, 1 - info.epsneg * steps, ends.ravel(), everywhere]).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "routine", "bound"),
    [(np.float32, "logarithm", LOGARITHM_ULP), (np.float64, "logarithm_double", LOGARITHM_DOUBLE_ULP)],
)
def test_logarithm_over_every_exponent(dtype, routine, bound):
    """The logs of cross_entropy's features, subnormal numbers' too, which lose their digits where they are not made
    normal first."""
    x = np.concatenate([-every_exponent(dtype), about_1(dtype)])
    x = x[x > 0]
    ours = getattr(probe, routine)(padded(x))[: x.size]
    assert last_places(ours, np.log(x.astype(np.longdouble))).max() <= bound


@pytest.mark.parametrize("routine", ["logarithm", "logarithm_double"])
def test_the_ends_of_the_logarithm(routine):
    """As std::log has them: a feature may be any number, and no NaN may appear or disappear."""
    dtype = np.float64 if routine.endswith("double") else np.float32
    info = np.finfo(dtype)
    negative = [-info.smallest_subnormal, -info.tiny, -1, info.min, -np.inf]
    x = np.array([0, -0.0, 1, np.inf, np.nan, -np.nan, info.smallest_subnormal, info.max, *negative], dtype=dtype)
    ours = getattr(probe, routine)(padded(x))[: x.size]
    with np.errstate(divide="ignore", invalid="ignore"):
        np.testing.assert_allclose(ours, np.log(x), rtol=info.eps)
    assert ours[2] == 0


def padded(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.zeros(-x.size % 64, x.dtype)])
