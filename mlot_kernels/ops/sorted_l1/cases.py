"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mlot_kernels.cases import Case, Outputs, large_pair, logits_examples, sides_case
from mlot_kernels.logits import Logits, Side, log_probabilities, prepare
from mlot_kernels.ops.sorted_l1 import reference, sorted_l1

large = large_pair


def large_cases(
    dtype: torch.dtype, device: str, *, sequences: int = 2, rows: int = 64, vocabulary: int = 151_936
) -> list[Case]:
    """The teacher has 128,256 columns where the student has 151,936."""
    student, teacher = large(
        dtype,
        device,
        sequences=sequences,
        rows=rows,
        student_vocabulary=vocabulary,
        teacher_vocabulary=vocabulary * 128_256 // 151_936,
    )
    return [_case(f"ties {ties}", Logits(student), Logits(teacher), False, ties) for ties in reference.TIES]


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(2).to(dtype).to(device)

    for name, student, smooth in logits_examples(dtype, device):
        *leading, width = student.values.shape
        other = max(1, width - 4) if width % 2 else width + 5
        teacher = replace(student, values=randn(*leading, other), vocab_size=None, columns=None, log_scale=None)
        if name == "many rows":  # each takes seconds in Triton's interpreter
            student, teacher = (replace(side, values=side.values[:, :20].contiguous()) for side in (student, teacher))
        elif smooth and _near(student, teacher):  # README.md, near-ties
            teacher = replace(teacher, values=teacher.values * 1.25)
        yield _case(name, student, teacher, smooth)
    student, teacher = Logits(randn(2, 3, 30)), Logits(randn(2, 3, 25), temperature=0.5, standardize=True)
    for ties in reference.TIES:
        for tail in reference.TAILS:
            yield _case(f"ties {ties}, 7 columns, {tail}", student, teacher, True, ties, 7, tail)
    yield _case("more columns than there are", student, teacher, True, top_k=100)
    flat = randn(2, 3, 26).mul(2).round()  # runs of equal logits, which cross the other side's values
    yield _case("ties, mean", Logits(flat), teacher, False)
    yield _case("ties, stable", Logits(flat), teacher, False, "stable")
    yield _case("ties on both sides", Logits(flat), Logits(randn(2, 3, 40).round()), False, top_k=9)
    everything = Logits(randn(2, 5, 24), student.rows, 0.7, True, 20, torch.arange(24, device=device) % 5 > 0)
    student, teacher = (
        replace(everything, values=randn(2, 5, 24), temperature=temperature, log_scale=-randn(2, 5).abs() / 8)
        for temperature in (0.7, 2.0)
    )
    yield _case("every field on both sides", student, teacher, True)
    yield _case("one distribution, twice", student, student, False)


def _near(student: Logits, teacher: Logits) -> bool:
    """Whether two sorted probabilities agree to a few last places, so that rounding chooses which is larger."""
    sides = [prepare(replace(z, values=z.values.double())).side for z in (student, teacher)]
    p, q = (log_probabilities(*side).exp().sort(descending=True).values for side in sides)
    n = min(p.shape[-1], q.shape[-1])
    difference = (p[..., :n] - q[..., :n]).abs()
    return bool(((difference > 0) & (difference < 2e-6 * p[..., :n])).any())


def _case(
    name: str,
    student: Logits,
    teacher: Logits,
    smooth: bool,
    ties: str = "mean",
    top_k: int | None = None,
    tail: str = "bucket",
) -> Case:
    def call(sides: tuple[Logits, ...], backend: str | None) -> Outputs:
        return (sorted_l1(sides[0], sides[1], ties=ties, top_k=top_k, tail=tail, backend=backend),)

    def definition(student: Side, teacher: Side) -> Outputs:
        most = max(student.vocab_size, teacher.vocab_size)
        return (reference.sorted_l1(student, teacher, ties, most if top_k is None else top_k, tail),)

    case = sides_case(name, (student, teacher), smooth, call, definition, output_rows=(2,), batch_dimensions=(0,))
    # The Triton backend counts long rows in 12 bytes (float32: 20) for each of 65,536 values and of up to 128 pairs,
    # also where rows are few (README.md); a quarter of that in floats, since it may take four times as many.
    size, most = student.values.element_size(), min(side.values.shape[-1] for side in (student, teacher))
    pairs = min(student.values[..., 0].numel(), 128) if size < 8 and most >= 4096 else 0
    assert case.memory is not None
    return replace(case, memory=case.memory + pairs * (1 << 16) * (5 if size == 4 else 3) // 4)
