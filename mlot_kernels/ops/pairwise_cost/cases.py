"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlot_kernels.cases import Case, large_features
from mlot_kernels.ops.pairwise_cost import pairwise_cost, reference
from mlot_kernels.transport import METRICS

large = large_features


def large_cases(dtype: torch.dtype, device: str, *, sequences: int = 8, rows: int = 256, **_: int) -> list[Case]:
    """``sequences`` problems of ``rows`` times seven eighths as many rows; a vocabulary's size has no part in them."""
    x, y = large(dtype, device, problems=sequences, student_rows=rows, teacher_rows=max(1, rows * 7 // 8), width=50)
    return [_case("l1, 50 features", x, y, "l1"), _case("cosine, 50 features", x, y, "cosine")]


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.05).to(dtype).to(device)

    for metric in METRICS:
        yield _case(metric, rand(2, 5, 7), rand(2, 4, 7), metric)
        yield _case(f"{metric}, permuted", rand(5, 2, 7).transpose(0, 1), rand(2, 7, 4).transpose(1, 2), metric)
        yield _case(f"{metric}, one of each", rand(1, 1, 1) + 1, rand(1, 1, 1), metric)
        yield _case(f"{metric}, wide", rand(1, 3, 300), rand(1, 70, 300), metric)
        yield _case(f"{metric}, no rows", rand(2, 0, 3), rand(2, 4, 3), metric)
    x, y = rand(1, 4, 6), rand(1, 4, 6)
    x[0, 1], x[0, 2, 3] = y[0, 2], y[0, 0, 3]
    for metric in ("l1", "l2", "sqeuclidean"):
        yield _case(f"{metric}, ties", x, y, metric, smooth=False)
    x, y = rand(1, 4, 6), rand(1, 4, 6)
    x[0, 0], y[0, 1] = 0, 0
    if dtype not in (torch.float16, torch.bfloat16):  # their squares underflow, and so do the gradient's digits
        x[0, 1] *= 1e-9
    yield _case("cosine, vectors of almost no length", x, y, "cosine", smooth=False)
    x, y = rand(1, 4, 6), rand(1, 4, 6)
    x[0, 0, 0] = x[0, 1, 2] = y[0, 1, 2] = 0
    x[0, :, 2] = 0
    yield _case("cross_entropy, zeros", x, y, "cross_entropy", smooth=False)


def _case(name: str, x: Tensor, y: Tensor, metric: str, smooth: bool = True) -> Case:
    def call(inputs: tuple[Tensor, ...], backend: str | None) -> tuple[Tensor, ...]:
        return (pairwise_cost(inputs[0], inputs[1], metric=metric, backend=backend),)

    def definition(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (reference.pairwise_cost(inputs[0], inputs[1], metric),)

    return Case(
        name,
        (x, y),
        call,
        definition,
        input_rows=(2, 2),
        output_rows=(2,),
        batch_dimensions=(0,),
        sequence=lambda b: _case(f"{name}, sequence {b}", x[b : b + 1], y[b : b + 1], metric, smooth),
        counted=(0, 0, 0) if x.shape[1] else None,
        smooth=smooth,
    )
