"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mlot_kernels.cases import Case, Outputs, large_logits, logits_examples, sides_case
from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits, Ranked, Side, prepare
from mlot_kernels.ops.match_columns import match_columns, reference
from mlot_kernels.rows import Rows


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def large(
    dtype: torch.dtype, device: str, seed: int = 0, *, sequences: int, rows: int, vocabulary: int, k: int
) -> tuple[Tensor, ...]:
    """Inputs of a real size: the student's logits ``[sequences, rows, vocabulary]``, and a teacher's log-probabilities
    ``[sequences, rows, k]`` at its k columns, of a vocabulary as large as the student's."""
    student = large_logits(dtype, device, 2 * seed, sequences, rows, vocabulary)
    teacher = large_logits(accumulator(dtype), device, 2 * seed + 1, sequences, rows, vocabulary).log_softmax(-1)
    columns = teacher.exp().sum(1, keepdim=True).topk(k).indices  # [B, 1, k]
    return student, teacher.gather(2, columns.expand(-1, rows, -1))


def large_cases(
    dtype: torch.dtype, device: str, *, sequences: int = 2, rows: int = 256, vocabulary: int = 151_936
) -> list[Case]:
    student, teacher = large(dtype, device, sequences=sequences, rows=rows, vocabulary=vocabulary, k=50)
    return [_case("50 columns, greedy", Logits(student), teacher, False, "greedy")]


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(2).to(dtype).to(device)

    def teacher(student: Logits, k: int) -> Tensor:
        """Log-probabilities of the student's rows at k columns of a larger vocabulary."""
        B, A = prepare(student).side.row_index.shape
        rows = (A,) if student.values.dim() == 2 else (B, A)
        x = randn(*rows, k + 9).to(accumulator(dtype))
        return x.log_softmax(-1).sort(dim=-1, descending=True).values[..., :k].contiguous()

    for name, student, smooth in logits_examples(dtype, device):
        for method in reference.METHODS:
            yield _case(f"{name}, {method}", student, teacher(student, 5), smooth, method)
    for method in reference.METHODS:
        student = Logits(randn(2, 3, 12))
        yield _case(f"k = V, {method}", student, teacher(student, 12), True, method)
        yield _case(f"k = 1, {method}", student, teacher(student, 1), True, method)
        few = replace(student, columns=torch.arange(12, device=device) % 4 == 0)
        yield _case(f"fewer columns than k, {method}", few, teacher(student, 5), True, method)
        impossible = teacher(student, 5).masked_fill(torch.arange(5, device=device) > 2, float("-inf"))
        yield _case(f"-inf in the teacher's, {method}", student, impossible, False, method)


def _case(name: str, student: Logits, teacher: Tensor, smooth: bool, method: str) -> Case:
    """The teacher's log-probabilities stand as values of ``Logits`` whose rows are the student's, moved to the front:
    so a case splits into sequences and knows what counts."""
    index = prepare(student).side.row_index  # [B, A]
    ordinal = torch.arange(index.shape[1], device=index.device).expand_as(index).masked_fill(index < 0, -1)
    rows = Rows(ordinal, (index >= 0).sum(1), ordinal.clamp(max=0), torch.ones_like(index[:, 0]), index.shape[1])

    def call(sides: tuple[Logits, ...], backend: str | None) -> Outputs:
        log_t = sides[1].values
        columns = torch.zeros_like(log_t[..., 0, :], dtype=torch.int64)
        ranked = Ranked(log_t[None], columns, torch.zeros_like(log_t[..., 0]))
        return (match_columns(sides[0], ranked, method=method, backend=backend),)

    def definition(student: Side, teacher: Side) -> Outputs:
        return (reference.match_columns(*student, teacher.values, method),)

    def costs(student: Side, teacher: Side) -> Outputs:
        return (reference.costs(student, teacher.values),)

    def case_of(definition: Callable[[Side, Side], Outputs]) -> Case:
        sides = student, Logits(teacher, rows)
        return sides_case(name, sides, smooth, call, definition, output_rows=(2,), batch_dimensions=(0,))

    def excess(inputs: tuple[Tensor, ...], outputs: Outputs) -> Tensor:
        return _excess(case_of(costs).definition(inputs)[0], outputs[0], method)

    (B, A), k, V = index.shape, teacher.shape[-1], student.values.shape[-1]
    memory = B * k * V + B * A * k + V  # the costs are most of it
    return replace(case_of(definition), memory=memory, excess=excess, waits=method == "optimal")


def _excess(D: Tensor, columns: Tensor, method: str) -> Tensor:
    """Each greedy choice's cost above the least that was free, ``[B, k]``; an assignment's above the least, ``[B]``."""
    chosen = columns >= 0
    twice = ((columns[:, None] == columns[:, :, None]).sum(-1) > 1) & chosen
    paid = _at(D, columns).masked_fill(twice, float("inf"))
    if method == "optimal":
        best = reference.optimal(D)
        too_few = chosen.sum(1) != (best >= 0).sum(1)
        return (paid.sum(1) - _at(D, best).sum(1)).masked_fill(too_few, float("inf"))
    worse = []
    for i in range(columns.shape[1]):
        least = D[:, i].amin(-1)  # [B]; inf where none is free, NaN where all is
        wrong = chosen[:, i] != least.isfinite()
        worse.append((paid[:, i] - least).masked_fill(~chosen[:, i], 0).masked_fill(wrong, float("inf")))
        taken = columns[:, i, None, None].clamp(min=0).expand(-1, D.shape[1], 1)
        D = D.scatter(2, taken, float("inf"))
    return torch.stack(worse, 1)


def _at(D: Tensor, columns: Tensor) -> Tensor:
    """What each teacher column pays, ``[B, k]``; 0 where it has no column."""
    return D.gather(2, columns.clamp(min=0)[..., None])[..., 0].masked_fill(columns < 0, 0)
