"""The CUDA kernel that puts rows into bins of log2 p, held against the one that sorts them.

Rows are short here and bins few (MLOT_ON_HOST_BINS); as many logits as there are bins have room in open ones.
"""

import pytest
import torch

from mlot_kernels import Logits, Rows, sides, sorted_l1
from mlot_kernels.ops.sorted_l1 import op
from tests.conftest import CUDA_ON_HOST
from tests.ops.test_sorted_l1 import gradients

pytestmark = pytest.mark.skipif(not CUDA_ON_HOST, reason="on a GPU rows of 2048 columns and more go into bins")
BINS = "MLOT_ON_HOST_BINS"
SIDES = (slice(1, 9), slice(9, 17))  # of the outputs: peak, log_total, mean, scale, slope, total, moment, steps


def outputs(student, teacher, ties="mean", top_k=None, tail="bucket"):
    s, t = sides.prepare_pair(student, teacher)
    most = max(s.side.vocab_size, t.side.vocab_size)
    return op._forward(*s.side, *t.side, ties, most if top_k is None else top_k, tail, "cuda")


def by_both(monkeypatch, bins, *arguments, **options):
    monkeypatch.setenv(BINS, str(bins))
    binned = outputs(*arguments, **options)
    monkeypatch.delenv(BINS)
    return binned, outputs(*arguments, **options)


def signs(logits, x, steps):
    """Of the logits ``[V]`` that are looked at, by the steps that backward gets."""
    looked_at = x > -torch.inf
    if logits.columns is not None:
        looked_at &= logits.columns
    sign = torch.full_like(x, float(steps[0, 1]), dtype=steps.dtype)
    for threshold, own in steps[1 : max(1, int(steps[0, 0]))]:
        sign = torch.where(x.to(steps.dtype) < threshold, own, sign)
    return sign[looked_at]


def agree(binned, by_sort, student, teacher):
    """Equal signs of all logits; sums of float64, rounded, in another order."""
    exact = student.values.dtype == teacher.values.dtype == torch.float64
    tolerance = {"rtol": 1e-12 if exact else 2e-7, "atol": 1e-14 if exact else 1e-7, "equal_nan": True}
    torch.testing.assert_close(binned[0], by_sort[0], **tolerance)
    for logits, side in zip((student, teacher), SIDES, strict=True):
        *own, steps = binned[side]
        *expected, expected_steps = by_sort[side]
        for a, b in zip(own, expected, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        for row, a, b in zip(logits.values[0], steps[0], expected_steps[0], strict=True):
            assert a[0, 0] == b[0, 0]
            torch.testing.assert_close(signs(logits, row, a), signs(logits, row, b), rtol=0, atol=0, equal_nan=True)


def is_binned(binned, by_sort):
    """Thresholds of the two forms are other numbers between the same logits; a pair that is left has the same."""
    return any(not torch.equal(binned[side][-1], by_sort[side][-1]) for side in SIDES)


def rows(kind, width, dtype, generator):
    x = torch.randn(1, 2, width, generator=generator, dtype=torch.float64)
    match kind:
        case "near uniform":
            x *= 0.02
        case "ties":
            x = (x * 2).round()
        case "heaps":  # each in one bin of the first level
            x = torch.randint(6, x.shape, generator=generator) * 1.5 + x * 1e-3
        case "one hot":
            x *= 0.01
            x[..., 7] = 30
        case "-inf":
            x[..., ::3] = -torch.inf
        case "underflow":
            x *= 60
        case _:
            x *= 2
    return x.to(dtype)


KINDS = ["usual", "near uniform", "ties", "heaps", "one hot", "-inf", "underflow"]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("bins", [64, 256])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_binned_rows_have_the_signs_of_sorted_ones(kind, dtypes, bins, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    s, t = (rows(kind, width, dtype, generator) for width, dtype in zip((403, 350), dtypes, strict=True))
    columns = torch.rand(403, generator=generator) < 0.8
    scale = -torch.rand(1, 2, generator=generator, dtype=torch.float64).to(t.dtype if t.dtype.itemsize > 2 else None)
    plain = Logits(s), Logits(t)
    special = Logits(s, columns=columns, temperature=0.7, standardize=True), Logits(t, temperature=2.0, log_scale=scale)
    any_binned = False
    for student, teacher in (plain, special):
        for options in ({}, {"ties": "stable", "top_k": 40}, {"top_k": 25, "tail": "drop"}):
            binned, by_sort = by_both(monkeypatch, bins, student, teacher, **options)
            agree(binned, by_sort, student, teacher)
            any_binned |= is_binned(binned, by_sort)
    assert any_binned or bins < 256 or kind not in ("usual", "-inf")  # few numbers or bins may leave all to the sort


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_bin_of_the_first_level_holds_nearly_all(dtype, monkeypatch):
    """Two logits set the range, the others are in one bin, more than have room, and divided on the second level."""
    width, bins = 400, 256
    spread = torch.linspace(0, 0.01, width - 2, dtype=torch.float64)
    s, t = (torch.cat([torch.tensor([3.0, -3.0]), x])[None, None].to(dtype) for x in (spread, spread * 1.5 - 0.001))
    student, teacher = Logits(s), Logits(t)
    binned, by_sort = by_both(monkeypatch, bins, student, teacher)
    agree(binned, by_sort, student, teacher)
    assert is_binned(binned, by_sort)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_has_no_room_is_sorted(dtype, monkeypatch):
    """The second of three pairs is one row twice: every bin stays open."""
    generator = torch.Generator().manual_seed(2)
    s, t = (rows("usual", 300, dtype, generator).repeat(1, 2, 1)[:, :3].contiguous() for _ in range(2))
    t *= 1.4
    t[:, 1] = s[:, 1]
    student, teacher = Logits(s), Logits(t)
    binned, by_sort = by_both(monkeypatch, 256, student, teacher)
    agree(binned, by_sort, student, teacher)
    assert binned[0][0, 1] == 0
    for side in SIDES:
        assert torch.equal(binned[side][-1][0, 1], by_sort[side][-1][0, 1])
        assert not torch.equal(binned[side][-1], by_sort[side][-1])


@pytest.mark.parametrize("bins", [16, 64])
def test_probabilities_at_the_edges_of_bins(bins, monkeypatch):
    """Logits a whole number of bins apart, and their neighbours of one last place."""
    step = 12 / bins
    grid = torch.arange(-bins // 2, bins // 2, dtype=torch.float32) * step
    grid = torch.cat([grid, grid.nextafter(torch.tensor(torch.inf)), grid.nextafter(torch.tensor(-torch.inf))])
    student = Logits(grid[None, None].contiguous())
    for shift in (0.0, step / 2, step):
        teacher = Logits((grid.flip(0) + shift)[None, None, : grid.numel() - 5].contiguous())
        agree(*by_both(monkeypatch, bins, student, teacher), student, teacher)


def test_pairs_that_are_none_and_rows_of_nan(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    s, t = (torch.randn(1, 4, width, generator=generator) for width in (90, 80))
    s[0, 2, 5] = torch.nan
    mask = torch.tensor([[True, False, True, True]])
    results = []
    for bins in ("32", None):
        if bins is None:
            monkeypatch.delenv(BINS)
        else:
            monkeypatch.setenv(BINS, bins)
        results.append(
            gradients(
                lambda a, b: sorted_l1(Logits(a, Rows.from_mask(mask, spans="one")), Logits(b), backend="cuda"),
                s,
                t,
            )
        )
    for own, truth in zip(*results, strict=True):
        torch.testing.assert_close(own, truth, rtol=2e-6, atol=1e-7, equal_nan=True)
    assert results[0][0].isnan().any()


@pytest.mark.parametrize("options", [{}, {"ties": "stable", "top_k": 90}], ids=str)
def test_two_runs_are_equal_to_the_bit(options, monkeypatch):
    """Lists come to be in the order of atomics, which the order of threads is part of."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = (Logits(rows("usual", width, torch.float32, generator)) for width in (500, 450))
    monkeypatch.setenv(BINS, "64")
    results = []
    for order in "012":
        monkeypatch.setenv("MLOT_ON_HOST_ORDER", order)
        results.append(outputs(student, teacher, **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
