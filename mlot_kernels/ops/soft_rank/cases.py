"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlot_kernels.cases import Case
from mlot_kernels.ops.soft_rank import reference, soft_rank


def large(dtype: torch.dtype, device: str, seed: int = 0, *, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Values ``[rows, width]``, spread as the logits of two top-k sets' union, and lengths from half the width on."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator).mul(3).to(dtype).to(device)
    return values, torch.randint((width + 1) // 2, width + 1, (rows,), generator=generator).to(device)


def large_cases(dtype: torch.dtype, device: str, *, sequences: int = 8, rows: int = 1024, **_: int) -> list[Case]:
    """``sequences`` times ``rows`` rows; a vocabulary's size has no part in them."""
    return [
        _case(f"{width} wide", values.view(sequences, rows, width), lengths.view(sequences, rows))
        for width in (20, 64)
        for values, lengths in (large(dtype, device, rows=sequences * rows, width=width),)
    ]


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(3).to(dtype).to(device)

    def lengths(*counts: list[int]) -> Tensor:
        return torch.tensor(counts, device=device)

    yield _case("odd width", randn(2, 3, 37))
    yield _case("two entries", randn(2, 3, 2))
    yield _case("rows of a batch", randn(5, 12))
    yield _case("lengths", randn(3, 4, 17), lengths([17, 5, 1, 0], [2, 3, 4, 16], [0, 0, 0, 0]))
    yield _case("permuted", randn(4, 2, 18).transpose(0, 1), epsilon=0.5)
    yield _case("columns that are no neighbours", randn(2, 9, 5).mT)
    every = lengths([3, 20, 0], [11, 19, 20]).int()
    yield _case("every argument", randn(2, 3, 40)[..., ::2], every, epsilon=2.5)
    yield _case("probabilities, one block", randn(2, 4, 20).double().softmax(-1).to(dtype))
    yield _case("one entry", randn(2, 3, 1))
    yield _case("hard", randn(2, 4, 10), epsilon=1e-4)
    yield _case("widest of a warp", randn(1, 3, 64), epsilon=0.2)
    yield _case("many rows", randn(3, 30, 20), epsilon=0.7)
    yield _case("wide", randn(1, 2, 300), epsilon=0.05)
    yield _case("at a large offset", (randn(1, 4, 24).float() + 1e3).to(dtype), epsilon=0.7)
    # Its kinks are where the ties are and nowhere else: sums of halves are never multiples of 0.7.
    yield _case("repeated values", randn(2, 4, 30).round(decimals=0) / 2, epsilon=0.7, smooth=False)
    yield _case("one value", torch.full((2, 2, 9), 0.3, dtype=dtype, device=device))
    apart = torch.stack([torch.randperm(16, generator=generator) for _ in range(4)]).view(2, 2, 16)
    yield _case("epsilon apart", apart.to(dtype).to(device), smooth=False)
    infinite = randn(2, 3, 14)
    infinite[0, 0, 3:6], infinite[0, 1, 2], infinite[1] = float("-inf"), float("inf"), float("-inf")
    infinite[1, 0, ::3] = float("inf")
    yield _case("infinite", infinite, smooth=False)


def _case(
    name: str, values: Tensor, lengths: Tensor | None = None, *, epsilon: float = 1.0, smooth: bool = True
) -> Case:
    n = values.shape[-1]

    def call(inputs: tuple[Tensor, ...], backend: str | None) -> tuple[Tensor, ...]:
        return (soft_rank(inputs[0], lengths, epsilon=epsilon, backend=backend),)

    def definition(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, flat = inputs[0].reshape(-1, n), None if lengths is None else lengths.reshape(-1).long()
        return (reference.soft_rank(rows, flat, epsilon).view(inputs[0].shape),)

    def sequence(b: int) -> Case:
        of_b = None if lengths is None else lengths[b : b + 1]
        return _case(f"{name}, sequence {b}", values[b : b + 1], of_b, epsilon=epsilon, smooth=smooth)

    def uncounted(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert lengths is not None
        beyond = torch.arange(n, device=values.device) >= lengths[..., None]
        poison = torch.full_like(inputs[0], float("nan"))
        poison[..., 1::2] = float("inf")
        return (torch.where(beyond, poison, inputs[0]),)

    first = (0,) * values.dim()
    return Case(
        name,
        (values,),
        call,
        definition,
        input_rows=(values.dim() - 1,),
        output_rows=(values.dim() - 1,),
        batch_dimensions=(0,),
        sequence=sequence,
        uncounted=None if lengths is None else uncounted,
        counted=first if lengths is None or lengths[first[:-1]] > 0 else None,
        gradient_scale=lambda _: (1 / epsilon,),
        memory=values.numel(),
        smooth=smooth,
    )
