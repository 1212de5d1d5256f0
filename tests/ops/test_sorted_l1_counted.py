"""What is hard for kernels that count 16-bit values one by one."""

import pytest
import torch

from mlot_kernels import Logits, sorted_l1
from tests.conftest import backends_of
from tests.ops.test_sorted_l1 import gradients

BACKENDS = [name for name in backends_of("sorted_l1") if name in ("reference", "cuda")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_16_bit_value_is_told_from_every_other(backend, dtype):
    """Both rows hold all values, in other orders, one side's twice as hot."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.float().abs() <= 1e15)]  # beyond, a gradient is too small for bfloat16
    hot = float(values.max()) / 4
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(3))
    ours, expected = (
        gradients(  # times the temperature, or they would underflow
            lambda s, t, b=b: hot * sorted_l1(Logits(s, temperature=hot), Logits(t, temperature=2 * hot), backend=b),
            *(x[None].to(d) for x in (values, values[order])),
        )
        for b, d in ((backend, dtype), ("reference", torch.float64))
    )
    # Of 32 threads, which only tests have, each adds two thousand terms in float32: 2e-6 for either row.
    torch.testing.assert_close(ours[0].double() / hot, expected[0] / hot, rtol=0, atol=4e-6)
    for own, truth in zip(ours[1:], expected[1:], strict=True):
        error = (own.double() - truth).abs().max() / truth.abs().max()
        assert error <= 2e-6 + 2 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_all_16_bit_values_of_bfloat16_have_room(backend):
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    values = values[values.float().abs() <= 1e38][None]  # beyond, differences overflow
    ours, expected = (
        sorted_l1(Logits(x, temperature=1e37), Logits(x, temperature=2e37), backend=b)
        for b, x in ((backend, values), ("reference", values.double()))
    )
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_in_long_rows_of_16_bit_values(backend, dtype):
    student, teacher = torch.randn(2, 1, 3, 3000, generator=torch.Generator().manual_seed(4)).to(dtype)
    clean = gradients(lambda s, t: sorted_l1(s, t, backend=backend), student, teacher)
    student[0, 1, 7] = float("nan")
    for own, truth in zip(
        gradients(lambda s, t: sorted_l1(s, t, backend=backend), student, teacher), clean, strict=True
    ):
        assert own[0, 1].isnan().all()
        assert (own[0, ::2] == truth[0, ::2]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_equal_logits_than_16_bits_count(backend, dtype):
    """140,000 equal logits meet 70,000 that are larger: p = 1 / 140,000 against 1 / 70,000 or nothing."""
    student, teacher = torch.zeros(1, 140_000, dtype=dtype), torch.zeros(1, 70_000, dtype=dtype)
    loss, gradient, _ = gradients(lambda s, t: sorted_l1(s, t, backend=backend), student, teacher)
    assert loss.item() == pytest.approx(1, rel=1e-6)
    assert float(gradient.abs().max()) <= 1e-10  # their mean sign is 0
