"""Counts of a row's 16-bit values, against numpy.unique, on the instruction set of this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

probe = pytest.importorskip("mlot_kernels._probe", reason="built with MLOT_PROBE=1 alone")

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EVERY_PATTERN = np.arange(1 << 16, dtype=np.uint16)
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}
halves = pytest.mark.parametrize("name", HALVES)
# Rows are sorted below 2048 columns and counted from there on, in blocks of 4096.
widths = pytest.mark.parametrize("columns", [1, 2, 3, 15, 2047, 2048, 2049, 2051, 4095, 4096, 4097, 20_000])


def numbers(bits: np.ndarray, name: str) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16)).view(HALVES[name]).float().numpy()


def bits_of(x: np.ndarray, name: str) -> np.ndarray:
    return torch.from_numpy(x).to(HALVES[name]).view(torch.int16).numpy().view(np.uint16)


def rows(columns: int, name: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(columns)
    x = generator.standard_normal(columns)
    infinity = INFINITY[name]
    special = np.array([0, 0x8000, infinity, 0x8000 | infinity, infinity - 1, 1, 0x8001], dtype=np.uint16)
    return {
        "random": bits_of(x, name),
        "positive": bits_of(np.abs(x), name),
        "negative": bits_of(-np.abs(x), name),
        "ties": bits_of((x * 2).round(), name),
        "all equal": bits_of(np.full(columns, 1.5), name),
        "ends": generator.choice(special, columns),
        "all -inf": np.full(columns, 0x8000 | infinity, dtype=np.uint16),
        "zeros of both signs": generator.choice(special[:2], columns),
        "any pattern": generator.integers(0, 1 << 16, columns, dtype=np.uint16),
        "NaN at the end": np.append(bits_of(x, name)[1:], np.uint16(0xFFFF)),
        "NaN at the start": np.append(np.uint16(infinity + 1), bits_of(x, name)[1:]),
    }


def masks(columns: int) -> list[np.ndarray | None]:
    every = np.arange(columns)
    return [None, every % 3 > 0, every % 7 == 3, every < 0, every >= 0]


def check(bits: np.ndarray, mask: np.ndarray | None, name: str, words: object) -> None:
    x, every, kept, nan = getattr(probe, f"count_values_{name}")(bits, mask)
    values = numbers(bits, name)
    counted = ~np.isnan(values) & (values != -np.inf)
    assert nan == np.isnan(values).any(), words
    truth, place, counts = np.unique(values[counted], return_inverse=True, return_counts=True)
    looked_at = np.ones(bits.size, dtype=bool) if mask is None else mask
    np.testing.assert_array_equal(x, truth[::-1], err_msg=str(words))
    np.testing.assert_array_equal(every, counts[::-1], err_msg=str(words))
    of_kept = np.bincount(place, weights=looked_at[counted], minlength=truth.size)
    np.testing.assert_array_equal(kept, of_kept[::-1], err_msg=str(words))


@halves
@widths
def test_counts_are_numpys(name, columns):
    """One after the other on the same counters: a counter that is passed over, or not cleared, shows in this row or in
    the next one. A row of one number shows where 16 codes are skipped that are not all empty."""
    for kind, bits in rows(columns, name).items():
        for mask in masks(columns):
            check(bits, mask, name, (kind, mask is not None))


@halves
def test_every_pattern_is_counted(name):
    """Both zeros as one number, NaN of every payload as no number, -inf not at all; and each pattern as itself."""
    generator = np.random.default_rng(0)
    times = generator.integers(0, 4, 1 << 16)
    for bits in (EVERY_PATTERN, generator.permutation(np.repeat(EVERY_PATTERN, times))):
        for mask in masks(bits.size):
            check(bits, mask, name, mask is not None)


@halves
@pytest.mark.parametrize("start", range(1, 5))
def test_a_row_may_start_anywhere(name, start):
    """Columns are read four at a time."""
    bits = rows(5000, name)["random"][start:]
    check(bits, None, name, start)


@halves
def test_neighbours_of_the_smallest_and_the_largest_code(name):
    """The range of codes that is walked ends at the row's own: one code too few loses a value."""
    for low in (1, 15, 16, 17, 31, 32, 0x8001, 0x800F, 0x8010, 0x8011):
        bits = np.resize(np.array([low, low + 40], dtype=np.uint16), 3000)
        check(bits, None, name, low)
