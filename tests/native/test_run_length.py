"""Sorting keys, counting few of them and making runs, against numpy, on the instruction set of this process."""

from __future__ import annotations

import numpy as np
import pytest

probe = pytest.importorskip("mlot_kernels._probe", reason="built with MLOT_PROBE=1 alone")

KEYS = {"float32": np.uint32, "float64": np.uint64}
BITS = {"float32": np.int32, "float64": np.int64}
dtypes = pytest.mark.parametrize("dtype", KEYS)

FEW = 1024  # distinct keys, and no more, are counted
WORTH_COUNTING = 8192  # keys


def hash_slot(keys: np.ndarray) -> np.ndarray:
    """Where count_few_keys looks for a key first."""
    folded = (keys ^ keys >> keys.dtype.type(4 * keys.itemsize)).astype(np.uint32)
    return (folded * np.uint32(0x9E3779B1)) >> np.uint32(20)


def key_rows(n: int, dtype: str) -> dict[str, np.ndarray]:
    generator, key = np.random.default_rng(n), KEYS[dtype]
    most = np.iinfo(key).max
    return {
        "all digits": generator.integers(0, most, n, dtype=key, endpoint=True),
        "the last digit alone": generator.integers(0, 2048, n, dtype=key),
        "the first bits alone": generator.integers(0, 2048, n, dtype=key) << key(8 * key().itemsize - 11),
        "descending": np.arange(n, 0, -1, dtype=key) * key(most // (n + 1)),
        "all equal": np.full(n, most // 3, dtype=key),
        "all but the last": np.append(np.full(max(n - 1, 0), most // 3, dtype=key), key(5))[:n],
        "both ends": np.where(generator.random(n) < 0.5, key(0), key(most)),
    }


@dtypes
@pytest.mark.parametrize("n", [0, 1, 2, 511, 512, 513, 4096, 50_000])
def test_keys_are_sorted(dtype, n):
    """On both sides of 512 keys, where digits are counted instead of keys compared. A digit that is left out or passed
    over wrongly shows in the rows that differ in this digit alone."""
    for name, keys in key_rows(n, dtype).items():
        np.testing.assert_array_equal(getattr(probe, f"sort_ascending_{dtype}")(keys), np.sort(keys), err_msg=name)


@dtypes
@pytest.mark.parametrize("distinct", [1, 7, FEW])
def test_few_keys_are_counted(dtype, distinct):
    """A key that is found in another one's slot, or twice, would give a run the wrong length."""
    generator = np.random.default_rng(distinct)
    keys = key_rows(distinct, dtype)["all digits"]
    drawn = np.concatenate([keys, generator.choice(keys, WORTH_COUNTING + 5)])
    ours = getattr(probe, f"count_few_keys_{dtype}")(generator.permutation(drawn))
    for own, truth in zip(ours, np.unique(drawn, return_counts=True), strict=True):
        np.testing.assert_array_equal(own, truth)


@dtypes
def test_keys_that_hash_to_one_slot_are_told_apart(dtype):
    """To the last slot: those behind the first key go on at the first one."""
    keys = key_rows(2_000_000, dtype)["all digits"]
    same = np.unique(keys[hash_slot(keys) == 4095])[:100]
    assert len(same) == 100
    drawn = np.repeat(same, np.arange(1, 101) * 2)
    ours = getattr(probe, f"count_few_keys_{dtype}")(np.random.default_rng(0).permutation(drawn))
    np.testing.assert_array_equal(ours[0], same)
    np.testing.assert_array_equal(ours[1], np.arange(1, 101) * 2)


@dtypes
def test_keys_that_are_not_few_are_not_counted(dtype):
    """Else more keys than slots would never find a free one."""
    count = getattr(probe, f"count_few_keys_{dtype}")
    keys = np.arange(FEW + 1, dtype=KEYS[dtype])
    assert count(np.resize(keys, 20_000)) is None
    assert count(np.resize(keys[:-1], 20_000)) is not None
    assert count(np.zeros(WORTH_COUNTING - 1, dtype=KEYS[dtype])) is None
    assert count(np.zeros(WORTH_COUNTING, dtype=KEYS[dtype])) is not None


@dtypes
@pytest.mark.parametrize("n", [0, 1, 512, 513, WORTH_COUNTING - 1, WORTH_COUNTING, 60_000])
def test_runs_are_the_distinct_numbers_in_descending_order(dtype, n):
    """Counted, compared or sorted by digits: the runs are the same. A key that does not come back as its number, or
    sorts on the wrong side of 0, shows here."""
    generator = np.random.default_rng(n)
    info = np.finfo(dtype)
    special = np.array([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, np.inf, 1e-40, -1e-40], dtype=dtype)
    x = generator.standard_normal(n).astype(dtype)
    patterns = generator.integers(-(2**31), 2**31, n).astype(BITS[dtype]) << BITS[dtype](8 * x.itemsize - 32)
    wild = patterns.view(dtype)
    rows = {
        "random": x,
        "ties": (x * 2).round(),
        "special": generator.choice(special, n),
        "random and special": np.where(generator.random(n) < 0.5, x, generator.choice(special, n)),
        "every exponent": np.where(np.isnan(wild) | (wild == -np.inf), x, wild),
        "all equal": np.full(n, -1.5, dtype=dtype),
    }
    for name, row in rows.items():
        values, counts = np.unique(row, return_counts=True)
        ours = getattr(probe, f"runs_of_{dtype}")(row)
        np.testing.assert_array_equal(ours[0], values[::-1], err_msg=name)
        np.testing.assert_array_equal(ours[1], counts[::-1], err_msg=name)


@dtypes
def test_the_number_above_is_the_next_one(dtype):
    """It is what a run's logits are below: one too far, and the run above loses its own sign."""
    info = np.finfo(dtype)
    special = [0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, info.tiny, -info.tiny, info.max, info.min]
    exponents = np.ldexp(1.0, np.arange(info.minexp, info.maxexp)).astype(dtype)
    x = np.concatenate([np.array(special, dtype=dtype), exponents, -exponents, np.nextafter(exponents, exponents / 2)])
    with np.errstate(over="ignore"):
        expected = np.nextafter(x, np.array(np.inf, dtype))
    np.testing.assert_array_equal(getattr(probe, f"value_above_{dtype}")(x), expected)
