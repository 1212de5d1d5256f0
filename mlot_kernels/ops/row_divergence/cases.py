"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlot_kernels.cases import Case, Outputs, large_pair, logits_examples, sides_case
from mlot_kernels.logits import Logits, Side
from mlot_kernels.ops.row_divergence import reference, row_divergence

DEFAULTS = {
    "kind": "forward_kl",
    "beta": 0.5,
    "skew": 0.1,
    "head": 0.5,
    "interpolation": 1.0,
    "floor": 0.0,
    "column_pairs": None,
}


def large(
    dtype: torch.dtype, device: str, seed: int = 0, *, sequences: int, rows: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's logits, ``[sequences, rows, vocabulary]``."""
    return large_pair(
        dtype,
        device,
        seed,
        sequences=sequences,
        rows=rows,
        student_vocabulary=vocabulary,
        teacher_vocabulary=vocabulary,
    )


def large_cases(
    dtype: torch.dtype, device: str, *, sequences: int = 2, rows: int = 64, vocabulary: int = 151_936
) -> list[Case]:
    student, teacher = large(dtype, device, sequences=sequences, rows=rows, vocabulary=vocabulary)
    return [_case(kind, Logits(student), Logits(teacher), False, kind=kind) for kind in ("forward_kl", "jsd")]


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(2).to(dtype).to(device)

    for i, (name, student, smooth) in enumerate(logits_examples(dtype, device)):
        values = randn(*student.values.shape).masked_fill(student.values == float("-inf"), float("-inf"))
        teacher = replace(student, values=values, log_scale=None)
        kind = reference.KINDS[i % len(reference.KINDS)]
        yield _case(f"{name}, {kind}", student, teacher, smooth, kind=kind)
    rows = Logits(randn(2, 5, 26)).rows
    student = Logits(randn(2, 5, 26), rows, 0.7, log_scale=-randn(2, 5).abs() / 8)
    teacher = Logits(randn(2, 5, 26), rows, 1.5, True, log_scale=-randn(2, 5).abs() / 8)
    columns = torch.arange(26, device=device) % 5 > 0
    pairs = torch.tensor([[3, 7], [0, 0], [25, 1], [3, 2], [9, 7]], device=device)
    for kind in reference.KINDS:
        yield _case(f"log scales, {kind}", student, teacher, True, kind=kind)
        chosen = replace(student, columns=columns), replace(teacher, columns=columns.flip(0))
        yield _case(f"other columns on each side, {kind}", *chosen, True, kind=kind)
        yield _case(f"pairs of columns, {kind}", student, teacher, True, kind=kind, column_pairs=pairs)
    narrow = Logits(randn(2, 5, 19), temperature=2.0)
    yield _case("pairs of vocabularies", narrow, teacher, True, kind="jsd", column_pairs=pairs.clamp(max=18))
    yield _case("jsd of 0.1", student, teacher, True, kind="jsd", beta=0.1)
    yield _case("jsd of 1", student, teacher, True, kind="jsd", beta=1.0)
    yield _case("skew 0", student, teacher, True, kind="skew_kl", skew=0.0)
    yield _case("skew 0.9", student, teacher, True, kind="skew_reverse_kl", skew=0.9)
    yield _case("a small head", student, teacher, True, kind="adaptive_kl", head=0.0)
    yield _case("a large head", student, teacher, True, kind="adaptive_kl", head=0.95)
    yield _case("interpolated", student, teacher, True, interpolation=0.4)
    plain = replace(teacher, standardize=False, columns=columns)
    yield _case("interpolated, chosen columns", replace(student, columns=columns), plain, True, interpolation=0.9)
    for kind in ("forward_kl", "jsd"):  # a floor below which a good part of either side lies
        yield _case(f"a floor under log scales, {kind}", student, teacher, True, kind=kind, floor=0.03)
        yield _case(f"a floor on other columns of each side, {kind}", *chosen, True, kind=kind, floor=0.03)
    many = torch.stack((torch.arange(40) % 19, torch.arange(40) * 7 % 26), 1).to(device)
    for kind in reference.KINDS[:-1]:
        options = {"kind": kind, "floor": 0.02, "column_pairs": many}
        yield _case(f"a floor at pairs of columns, {kind}", narrow, teacher, True, **options)
    absent = torch.arange(20, device=device) % 4 == 0
    apart = Logits(randn(2, 3, 20).masked_fill(absent, float("-inf"))), Logits(randn(2, 3, 20))
    for kind in ("reverse_kl", "jsd", "total_variation", "skew_kl", "skew_reverse_kl"):
        yield _case(f"columns that the student alone lacks, {kind}", *apart, False, kind=kind)
    for kind in ("forward_kl", "jsd", "total_variation", "skew_kl", "skew_reverse_kl"):
        yield _case(f"columns that the teacher alone lacks, {kind}", apart[1], apart[0], False, kind=kind)
    for kind in ("forward_kl", "reverse_kl"):
        yield _case(f"a floor for columns that the student alone lacks, {kind}", *apart, False, kind=kind, floor=1e-3)
    ahead = (Logits(torch.tensor([[[120.0, 0, -120, 1]]], dtype=dtype, device=device)), Logits(randn(1, 1, 4)))
    for kind in reference.KINDS:
        case = _case(f"far apart, {kind}", *ahead, False, kind=kind)
        yield replace(case, condition=1.0)  # log p / q is hundreds, times the last place of an exp
    for kind in ("forward_kl", "reverse_kl", "total_variation", "adaptive_kl"):  # others' definitions round 0
        yield _case(f"one distribution, twice, {kind}", student, student, False, kind=kind)


def _case(name: str, student: Logits, teacher: Logits, smooth: bool, **given: Any) -> Case:
    options: dict[str, Any] = DEFAULTS | given

    def call(sides: tuple[Logits, ...], backend: str | None) -> Outputs:
        return (row_divergence(sides[0], sides[1], **options, backend=backend),)

    def definition(student: Side, teacher: Side) -> Outputs:
        kind = options["kind"]
        end = kind, options["beta" if kind == "jsd" else "skew"]
        in_order = options | {"kind": reference.END_POINTS.get(end, kind)}
        fields = [in_order[name] for name in reference.Options._fields]
        return (reference.row_divergence(student, teacher, reference.Options._make(fields)),)

    smooth = smooth and options["kind"] != "adaptive_kl" and options["interpolation"] == 1  # which hold a part constant
    return sides_case(name, (student, teacher), smooth, call, definition, output_rows=(2,), batch_dimensions=(0,))
