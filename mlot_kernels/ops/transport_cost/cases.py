"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlot_kernels.cases import Case, large_features
from mlot_kernels.ops.transport_cost import reference, transport_cost
from mlot_kernels.transport import METRICS, TransportOptions, within

large = large_features


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def large_cases(
    dtype: torch.dtype, device: str, *, sequences: int = 8, rows: int = 256, vocabulary: int = 151_936
) -> list[Case]:
    """Problems of ``rows`` on both sides."""
    t, s = large(dtype, device, problems=sequences, student_rows=rows, teacher_rows=rows, width=50)
    return [_case("50 features", t, s)]


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.05).to(dtype).to(device)

    def lengths(*values: int) -> Tensor:
        return torch.tensor(values, device=device)

    x, y = rand(3, 5, 6), rand(3, 7, 6)
    for metric in METRICS:
        yield _case(metric, x, y, metric=metric, epsilon=0.5)
    yield _case("unit marginals", x, y, marginals="unit")
    yield _case("lengths", x, y, row_lengths=lengths(5, 2, 0), column_lengths=lengths(3, 7, 4))
    yield _case("weights and lengths", x, y, weight=rand(3, 7), column_lengths=lengths(3, 7, 4), marginals="unit")
    given = tuple(m / m.sum(1, keepdim=True) for m in (rand(3, 5), rand(3, 7)))
    yield _case("given marginals", x, y, *given)
    yield _case("permuted", rand(5, 3, 6).transpose(0, 1), rand(3, 6, 7).transpose(1, 2))
    yield _case("one of each", rand(2, 1, 4), rand(2, 1, 4))


def _case(
    name: str,
    x: Tensor,
    y: Tensor,
    row_marginal: Tensor | None = None,
    column_marginal: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    row_lengths: Tensor | None = None,
    column_lengths: Tensor | None = None,
    metric: str = "l1",
    epsilon: float = 0.3,
    marginals: str = "uniform",
) -> Case:
    """Differentiable inputs are x and y, then given marginals, then the column weight."""
    iterations = 8
    inputs = tuple(z for z in (x, y, row_marginal, column_marginal, weight) if z is not None)

    def named(inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        rest = list(inputs[2:])
        a, b = (rest.pop(0), rest.pop(0)) if row_marginal is not None else (None, None)
        return a, b, rest[0] if weight is not None else None

    def call(inputs: tuple[Tensor, ...], backend: str | None) -> tuple[Tensor, ...]:
        a, b, w = named(inputs)
        chosen: Any = marginals if a is None else (a, b)
        solved = transport_cost(
            inputs[0],
            inputs[1],
            metric=metric,
            epsilon=epsilon,
            iterations=iterations,
            marginals=chosen,
            row_lengths=row_lengths,
            column_lengths=column_lengths,
            column_weight=w,
            backend=backend,
        )
        return solved.cost, solved.regularized_cost

    def definition(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a, b, w = named(inputs)
        kind = marginals if a is None else "given"
        options = TransportOptions(
            a, b, row_lengths, column_lengths, w, epsilon, iterations, kind, 0.0, "log", "unrolled"
        )
        return reference.transport_cost(inputs[0], inputs[1], metric, options)

    def part(z: Tensor | None, b: int) -> Tensor | None:
        return None if z is None else z[b : b + 1]

    def sequence(b: int) -> Case:
        return _case(
            f"{name}, sequence {b}",
            x[b : b + 1],
            y[b : b + 1],
            part(row_marginal, b),
            part(column_marginal, b),
            weight=part(weight, b),
            row_lengths=part(row_lengths, b),
            column_lengths=part(column_lengths, b),
            metric=metric,
            epsilon=epsilon,
            marginals=marginals,
        )

    def uncounted(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, columns = (
            within(lengths, z.shape[0], z.shape[1], z.device) for z, lengths in ((x, row_lengths), (y, column_lengths))
        )
        nan = float("nan")
        rest = (
            z.masked_fill(~columns, nan) for z in inputs[2:]
        )  # only the weight: no case gives marginals and lengths
        return inputs[0].masked_fill(~rows[..., None], nan), inputs[1].masked_fill(~columns[..., None], nan), *rest

    return Case(
        name,
        inputs,
        call,
        definition,
        input_rows=(1,) * len(inputs),
        output_rows=(1, 1),
        batch_dimensions=(0, 0),
        sequence=sequence,
        uncounted=uncounted if row_lengths is not None or column_lengths is not None else None,
        counted=(0, 0, 0),
        # what cancels in dl/dC comes to each feature once per pair (sinkhorn's cases)
        gradient_scale=lambda inputs: tuple(4 * max(x.shape[1], y.shape[1]) / epsilon for _ in inputs),
        condition=4 / epsilon,
        memory=x.shape[0] * x.shape[1] * y.shape[1] - 1,  # less than the costs
    )
