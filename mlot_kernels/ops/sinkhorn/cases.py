"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlot_kernels.cases import Case
from mlot_kernels.ops.sinkhorn import reference, sinkhorn
from mlot_kernels.transport import DOMAINS


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def large(
    dtype: torch.dtype, device: str, seed: int = 0, *, problems: int, student_rows: int, teacher_rows: int
) -> tuple[Tensor, ...]:
    """Inputs of a real size: costs ``[problems, teacher_rows, student_rows]``, L1 distances of 50 probabilities."""
    generator = torch.Generator().manual_seed(seed)
    t, s = (
        (2 * torch.randn(problems, rows, 50, generator=generator)).softmax(-1) for rows in (teacher_rows, student_rows)
    )
    return (torch.cdist(t, s, p=1).to(dtype).to(device),)


def large_cases(
    dtype: torch.dtype, device: str, *, sequences: int = 8, rows: int = 256, vocabulary: int = 151_936
) -> list[Case]:
    """Problems of ``rows`` on both sides, and smaller ones, which one program solves."""
    small = min(rows, 64)
    (cost,) = large(dtype, device, problems=sequences, student_rows=max(rows, 160), teacher_rows=max(rows, 16))
    (few,) = large(dtype, device, problems=sequences, student_rows=small, teacher_rows=small)
    return [_case("one step a launch", cost, epsilon=1.0, iterations=20), _case("in registers", few, iterations=20)]


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(dtype).to(device)

    def lengths(*values: int) -> Tensor:
        return torch.tensor(values, device=device)

    cost = rand(3, 5, 7)
    for marginals in ("uniform", "unit"):
        for domain in DOMAINS:
            yield _case(f"{marginals}, {domain}", cost, marginals=marginals, domain=domain)
    given = tuple((m + 0.2) / (m + 0.2).sum(1, keepdim=True) for m in (rand(3, 5), rand(3, 7)))
    yield _case("given marginals", cost, *given)
    yield _case("column weights", cost, weight=rand(3, 7) + 0.5, marginals="unit")
    yield _case("lengths", cost, row_lengths=lengths(5, 3, 1), column_lengths=lengths(7, 2, 6))
    yield _case("lengths, unit", cost, row_lengths=lengths(5, 3, 1), column_lengths=lengths(1, 2, 6), marginals="unit")
    yield _case("length 0", cost, row_lengths=lengths(0, 3, 5), column_lengths=lengths(7, 0, 7))
    yield _case("every option", cost, *given, weight=rand(3, 7), row_lengths=lengths(5, 4, 2))
    yield _case("one step", cost, iterations=1)
    yield _case("one row", rand(2, 1, 6), marginals="unit")
    yield _case("one column", rand(2, 6, 1), marginals="unit")
    yield _case("permuted", rand(5, 3, 7).transpose(0, 1))
    for domain in ("log", "scaling"):
        yield _case(f"steep, {domain}", rand(2, 6, 6), epsilon=1e-3, iterations=25, domain=domain)
    yield _case("wide cost, many steps", 40 * rand(2, 9, 4), iterations=30, domain="scaling", marginals="unit")
    yield _case("flat", torch.full((2, 4, 4), 0.5, dtype=dtype, device=device))
    forbidden = cost.clone()
    forbidden[:, 0, 1] = forbidden[1, 2, 3] = float("inf")
    yield _case("forbidden pairs", forbidden, smooth=False)
    a, b = (marginal.clone() for marginal in given)
    a[:, 2] = b[0, 3] = b[1, 0] = 0
    yield _case("marginals of 0", cost, a, b, smooth=False)
    yield _case("long rows", rand(2, 9, 130), weight=rand(2, 130), column_lengths=lengths(130, 70), iterations=3)
    yield _case("many rows", rand(2, 36, 260), row_lengths=lengths(34, 36), iterations=3, marginals="unit")
    yield _case("many columns", rand(1, 33, 1030), iterations=2)


def _case(
    name: str,
    cost: Tensor,
    row_marginal: Tensor | None = None,
    column_marginal: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    row_lengths: Tensor | None = None,
    column_lengths: Tensor | None = None,
    marginals: str = "uniform",
    smooth: bool = True,
    **options: Any,
) -> Case:
    """Differentiable inputs are the cost, then given marginals, then the column weight."""
    present = [x for x in (cost, row_marginal, column_marginal, weight) if x is not None]
    epsilon, iterations = options.get("epsilon", 0.1), options.setdefault("iterations", 8)

    def named(inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        rest = list(inputs[1:])
        a, b = (rest.pop(0), rest.pop(0)) if row_marginal is not None else (None, None)
        return a, b, rest[0] if weight is not None else None

    def call(inputs: tuple[Tensor, ...], backend: str | None) -> tuple[Tensor, ...]:
        a, b, w = named(inputs)
        solved = sinkhorn(
            inputs[0],
            marginals=marginals if a is None else (a, b),  # type: ignore[arg-type]
            row_lengths=row_lengths,
            column_lengths=column_lengths,
            column_weight=w,
            return_plan=True,
            backend=backend,
            **options,
        )
        assert solved.plan is not None
        return solved.cost, solved.regularized_cost, solved.plan

    def definition(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a, b, w = named(inputs)
        kind = marginals if a is None else "given"
        outputs = reference.sinkhorn(inputs[0], a, b, row_lengths, column_lengths, w, epsilon, iterations, kind)
        return outputs

    def part(x: Tensor | None, b: int) -> Tensor | None:
        return None if x is None else x[b : b + 1]

    def sequence(b: int) -> Case:
        first = cost[b : b + 1]
        return _case(
            f"{name}, sequence {b}",
            first,
            part(row_marginal, b),
            part(column_marginal, b),
            weight=part(weight, b),
            row_lengths=part(row_lengths, b),
            column_lengths=part(column_lengths, b),
            marginals=marginals,
            smooth=smooth,
            **options,
        )

    kind = marginals if row_marginal is None else "given"
    p = reference.problem(cost.double(), row_marginal, column_marginal, row_lengths, column_lengths, epsilon, kind)

    def uncounted(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        counts = p.rows[:, :, None] & p.columns[:, None, :]
        sides = [p.rows, p.columns] if row_marginal is not None else []
        sides += [p.columns] if weight is not None else []
        rest = (
            torch.where(side | (x == 0), x, float("nan"))  # a marginal of 0 is read: it says what does not count
            for x, side in zip(inputs[1:], sides, strict=True)
        )
        return inputs[0].masked_fill(~counts, float("nan")), *rest

    finite = p.cost[p.cost.isfinite()]
    return Case(
        name,
        tuple(present),
        call,
        definition,
        input_rows=(1,) * len(present),
        output_rows=(1, 1, 1),
        batch_dimensions=(0, 0, 0),
        sequence=sequence,
        uncounted=None if bool(p.rows.all() & p.columns.all()) else uncounted,
        counted=(0, 0, 0) if bool(p.rows[0, 0] & p.columns[0, 0]) else None,
        # P o C / epsilon is a sum of such terms that cancel in the gradient.
        gradient_scale=lambda inputs: (1 + float(finite.max()) / epsilon,) + (1.0,) * (len(present) - 1),
        # Log-scalings of this size are rounded at every step, wherever they are kept (README).
        condition=float(finite.max() - finite.min()) / epsilon,
        smooth=smooth,
    )
