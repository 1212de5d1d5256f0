"""Small calls of every loss, for ``python -m mlot_kernels selftest``.

A loss has no maths of its own to hold it against: its definition is the loss itself on the backend ``reference``. So
that this is no comparison of the reference with itself, ``tolerance`` also bounds every backend's error, the
reference's included, against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlot_kernels.alignment import align_byte_offsets
from mlot_kernels.cases import Case, Outputs
from mlot_kernels.losses import (
    DivergenceLoss,
    HybridLoss,
    MultiLevelOTLoss,
    OfficialMultiLevelOTLoss,
    RankingLoss,
    SequenceTransportLoss,
    ULDLoss,
)
from mlot_kernels.merging import STRATEGIES, MergedRows, merge_groups
from mlot_kernels.ops.row_divergence.reference import KINDS

Loss = Callable[..., nn.Module]  # takes the loss's options and ``backend``


def cases(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    """Calls of the loss whose class has this name; ``LOSSES`` has the names."""
    return list(_CASES[name](_Inputs(dtype, device)))


def tolerance(dtype: torch.dtype, roundings: int = 1) -> tuple[float, float]:
    """How far a loss and its gradient may be from float64, each as a share of the largest value there.

    Both precisions read the same rounded logits, and a loss is kept in at least float32, so that the logits' own dtype
    costs nothing but ``roundings`` of the gradient at its end, half a last place each. What comes before are sums in
    float32 (float64 for float64), through Sinkhorn's iteration, whose steps divide costs by epsilon = 0.1 and so
    magnify rounding a few dozen times: 64 last places.
    """
    sums = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return sums, sums + (roundings * torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0)


class _Inputs:
    """Draws logits and labels, the same for every dtype and device but for rounding."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(5)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).mul(2).to(self.dtype).to(self.device)

    def labels(self, *patterns: str) -> Tensor:
        """``[B, T]``, one pattern per sequence: x is a token that counts."""
        return torch.tensor([[7 if c == "x" else -100 for c in pattern] for pattern in patterns], device=self.device)

    def lengths(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device)

    def alignment(self, strategy: str, student_size: int, teacher_size: int) -> MergedRows:
        """Of two sequences of 7 and 9 tokens: groups of one to three."""
        ends = (
            [[0, 2, 3, 5, 6, 8, 9], [0, 0, 1, 4, 6, 7, 9]],
            [[0, 1, 2, 3, 4, 5, 7, 8, 9], [0, 1, 2, 4, 5, 6, 9, 9, 9]],
        )
        masks = self.labels(".xxxxxx", "..xxxxx"), self.labels(".xxxxxxxx", ".xxxxxx..")
        offsets = [torch.tensor(side, device=self.device)[..., None].expand(-1, -1, 2) for side in ends]
        ids = [
            torch.randint(size, (2, width), generator=self.generator).to(self.device)
            for size, width in ((student_size, 7), (teacher_size, 9))
        ]
        made = align_byte_offsets(offsets[0], offsets[1], *(mask != -100 for mask in masks))
        return merge_groups(made, *ids, strategy=strategy)

    def weight(self, *shape: int) -> Tensor:
        """Float32 for every dtype, as a trainer passes it."""
        return torch.rand(*shape, generator=self.generator).to(self.device)


def _multi_level_ot(draw: _Inputs) -> Iterator[Case]:
    student, teacher = draw.randn(2, 7, 61), draw.randn(2, 9, 83)
    ragged = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", ".x...xxxx")

    def case(name: str, *arguments: Any, loss: Loss = MultiLevelOTLoss, **options: Any) -> Case:
        scale = 1 + 0.4 * 9 / options.get("epsilon", 0.1)  # its weight times what it is for transport_cost
        return _case(name, loss, *arguments, scale=scale, condition=4 / options.get("epsilon", 0.1), **options)

    yield case("paper", student, teacher, *ragged, loss=MultiLevelOTLoss.paper)
    few: dict[str, Any] = {"k": 20, "iterations": 5}
    yield case("all rows count", student, teacher, **few)
    yield case("teacher held fixed, no reduction", student, teacher, *ragged, teacher_fixed=True, reduction="none")
    weight = draw.weight(2, 7)
    yield case("token weights", student, teacher, *ragged, token_weight=weight, num_items_in_batch=3.0, **few)
    padded: dict[str, Any] = {"student_vocab_size": 55, "teacher_vocab_size": 70}
    yield case("padded vocabularies, ranked by batch", student, teacher, *ragged, scope="batch", **padded, **few)
    yield case("vocabularies below k", student[..., :17], teacher[..., :23], *ragged, iterations=5)
    other: dict[str, Any] = {
        "transport_temperature": 1.5,
        "epsilon": 0.3,
        "marginals": "uniform",
        "absolute_weight": 0.5,
    }
    yield case("another transport, ranked by token", student, teacher, *ragged, scope="token", **other, **few)
    empty = draw.labels("..xxxx.", "......."), draw.labels("...xxxxxx", ".........")
    yield case("an empty answer", student, teacher, *empty, **few)
    unequal = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", "...xxxxxx")
    yield case("unequal numbers of spans", student, teacher, *unequal, reduction="none", smooth=False, **few)
    yield case("greedy matching", student, teacher, *ragged, matching="greedy", **few)
    yield case("optimal matching", student, teacher, *ragged, matching="optimal", waits=True, **few)
    yield case("merged rows", student, teacher, alignment=draw.alignment("observed", 61, 83), **_MERGED, **few)


def _official_multi_level_ot(draw: _Inputs) -> Iterator[Case]:
    student, teacher = draw.randn(3, 8, 61), draw.randn(3, 10, 83)
    ragged = (
        draw.labels("..xxxx..", ".xxxxxxx", "....xx.."),
        draw.labels("...xxxxx..", "..xxx.....", ".xxxxxxxxx"),
    )

    def case(name: str, *arguments: Any, **options: Any) -> Case:
        return _case(name, OfficialMultiLevelOTLoss, *arguments, **options)

    for revision in ("712cfb4", "d8d298f", "77e32ae"):
        yield case(f"revision {revision}", student, teacher, *ragged, revision=revision)
    yield case("teacher held fixed, no reduction", student, teacher, *ragged, teacher_fixed=True, reduction="none")
    yield case("vocabularies below 50", student[..., :17], teacher[..., :31], *ragged)
    options: dict[str, Any] = {"skip_student_eos": True, "student_temperature": 2.0, "teacher_temperature": 1.5}
    yield case("ends of answers left out, temperatures", student, teacher, *ragged, skip_teacher_eos=True, **options)
    yield case("an empty answer", student, teacher, draw.labels("..xxxx..", ".xxxxxxx", "........"), ragged[1])
    yield case("greedy matching", student, teacher, *ragged, matching="greedy")


def _uld(draw: _Inputs) -> Iterator[Case]:
    student, teacher = draw.randn(2, 7, 37), draw.randn(2, 9, 29)
    ragged = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", ".x...xxxx")

    def case(name: str, *arguments: Any, **options: Any) -> Case:
        return _case(name, ULDLoss, *arguments, **options)

    yield case("defaults", student, teacher, *ragged)
    yield case("the larger teacher", student[..., :23], teacher, *ragged, reduction="none")
    yield case("teacher held fixed", student, teacher, *ragged, teacher_fixed=True)
    yield case("temperatures", student, teacher, *ragged, student_temperature=2.0, teacher_temperature=1.5)
    for tail in ("bucket", "drop"):
        yield case(f"top 8, {tail}", student, teacher, *ragged, top_k=8, tail=tail)
    tied = (x.repeat_interleave(2, -1) for x in (student, teacher))
    yield case("tied logits, stable", *tied, *ragged, ties="stable", smooth=False)
    yield case("token weights", student, teacher, *ragged, token_weight=draw.weight(2, 7))
    yield case("padded vocabularies", student, teacher, *ragged, student_vocab_size=31, teacher_vocab_size=20)
    unequal = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", "...xxxxxx")
    yield case("unequal numbers of spans", student, teacher, *unequal, reduction="none", smooth=False)
    yield case("merged rows", student, teacher, alignment=draw.alignment("bayesian", 37, 29), **_MERGED)


def _hybrid(draw: _Inputs) -> Iterator[Case]:
    student, teacher = draw.randn(2, 7, 37), draw.randn(2, 9, 29)
    ragged = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", ".x...xxxx")
    pairs = torch.stack((torch.arange(0, 36, 2), torch.arange(18)), 1).to(student.device)

    def case(name: str, *arguments: Any, **options: Any) -> Case:
        settings: dict[str, Any] = {"column_pairs": pairs, "roundings": 4} | options
        return _case(name, HybridLoss, *arguments, **settings)

    yield case("by position", student, teacher, *ragged)
    yield case("teacher held fixed", student, teacher, *ragged, teacher_fixed=True, beta=0.2)
    yield case("token weights", student, teacher, *ragged, token_weight=draw.weight(2, 7), beta=1.0)
    options: dict[str, Any] = {"student_temperature": 2.0, "matched_weight": 0.9, "unmatched_weight": 0.4}
    yield case("temperature and weights", student, teacher, *ragged, beta=0.0, reduction="none", **options)
    for strategy in STRATEGIES:
        yield case(strategy, student, teacher, alignment=draw.alignment(strategy, 37, 29), teacher_fixed=True)
    every = torch.arange(29).repeat(2, 1).T.contiguous().to(student.device)
    yield case("all of the teacher's columns", student, teacher, *ragged, column_pairs=every)


def _divergence(draw: _Inputs) -> Iterator[Case]:
    student, teacher = draw.randn(2, 7, 37), draw.randn(2, 9, 37)
    ragged = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", ".x...xxxx")

    def case(name: str, *arguments: Any, **options: Any) -> Case:
        return _case(name, DivergenceLoss, *arguments, **options)

    for kind in KINDS:  # a part of adaptive_kl is held constant
        yield case(kind, student, teacher, *ragged, kind=kind, smooth=kind != "adaptive_kl")
    yield case("teacher held fixed, no reduction", student, teacher, *ragged, teacher_fixed=True, reduction="none")
    yield case("temperatures", student, teacher, *ragged, student_temperature=2.0, teacher_temperature=1.5)
    yield case("token weights", student, teacher, *ragged, kind="jsd", token_weight=draw.weight(2, 7))
    padded: dict[str, Any] = {"student_vocab_size": 31, "teacher_vocab_size": 31}
    yield case("padded vocabularies", student, teacher, *ragged, kind="jsd", **padded)
    pairs = draw.lengths(3, 8, 0, 20, 30, 4).view(3, 2)
    yield case("pairs of columns", student, teacher[..., :29], *ragged, kind="jsd", column_pairs=pairs % 29)
    unequal = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", "...xxxxxx")
    yield case("unequal numbers of spans", student, teacher, *unequal, reduction="none", smooth=False)


def _ranking(draw: _Inputs) -> Iterator[Case]:
    student, teacher = draw.randn(2, 7, 37), draw.randn(2, 9, 37)
    ragged = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", ".x...xxxx")

    def case(name: str, *arguments: Any, **options: Any) -> Case:
        return _case(name, RankingLoss, *arguments, roundings=3 if "base" in options else 1, **options)

    yield case("alone", student, teacher, *ragged)
    yield case("paper", student, teacher, *ragged, k=5, ranking_weight=2.0, base="forward_kl")
    yield case("official", student, teacher, *ragged, k=5, dedup="official", base="reverse_kl", base_weight=0.5)
    yield case("dynamic, no reduction", student, teacher, *ragged, base="jsd", dynamic=True, reduction="none")
    yield case("teacher held fixed", student, teacher, *ragged, teacher_fixed=True, epsilon=3.0)
    yield case("probabilities", student, teacher, *ragged, space="probabilities")
    yield case("token weights", student, teacher, *ragged, token_weight=draw.weight(2, 7))
    yield case("padded vocabularies", student, teacher, *ragged, student_vocab_size=31, teacher_vocab_size=31)
    yield case("vocabularies below k", student[..., :6], teacher[..., :6], *ragged)
    unequal = draw.labels("..xxxx.", ".xx..xx"), draw.labels("...xxxxxx", "...xxxxxx")
    yield case("unequal numbers of spans", student, teacher, *unequal, reduction="none", smooth=False)


def _sequence_transport(draw: _Inputs) -> Iterator[Case]:
    x, y = draw.randn(3, 5, 6), draw.randn(3, 7, 6)
    lengths = draw.lengths(5, 2, 4), draw.lengths(3, 7, 6)

    def case(name: str, *arguments: Any, epsilon: float = 0.1, **options: Any) -> Case:
        settings: dict[str, Any] = {"condition": 4 / epsilon, "scale": 4 * 7 / epsilon}  # as for transport_cost
        return _case(name, SequenceTransportLoss, x, y, *arguments, epsilon=epsilon, **settings, **options)

    yield case("defaults")
    yield case("lengths", *lengths, reduction="none")
    yield case("an empty sequence", draw.lengths(5, 0, 4), lengths[1])
    yield case("L1, unit marginals", *lengths, metric="l1", epsilon=2.0, marginals="unit")
    yield case("token weights", *lengths, token_weight=draw.weight(3, 7))
    yield case("regularized", *lengths, regularized=True)
    # These two are the gradients of a problem that is solved, not of so many steps.
    yield case("envelope", *lengths, regularized=True, gradient="envelope", smooth=False)
    yield case("implicit", *lengths, gradient="implicit", iterations=200, epsilon=0.5, smooth=False)
    yield case("scaling", *lengths, domain="scaling", epsilon=0.5, iterations=10)


_MERGED: dict[str, Any] = {"roundings": 3}  # two gradients, and their sum

_CASES: dict[str, Callable[[_Inputs], Iterator[Case]]] = {
    "DivergenceLoss": _divergence,
    "HybridLoss": _hybrid,
    "MultiLevelOTLoss": _multi_level_ot,
    "OfficialMultiLevelOTLoss": _official_multi_level_ot,
    "RankingLoss": _ranking,
    "SequenceTransportLoss": _sequence_transport,
    "ULDLoss": _uld,
}
LOSSES = tuple(_CASES)


def _case(
    name: str,
    loss: Loss,
    first: Tensor,
    second: Tensor,
    *which: Tensor,
    alignment: MergedRows | None = None,
    teacher_fixed: bool = False,
    token_weight: Tensor | None = None,
    num_items_in_batch: float | None = None,
    condition: float = 0.0,
    scale: float = 1.0,
    smooth: bool = True,
    waits: bool = False,
    roundings: int = 1,
    **options: Any,
) -> Case:
    """Differentiable inputs are the two sides, or the student's alone.

    Args:
        which: labels or lengths of both sides.
        alignment: instead of them, for a loss that takes one.
        condition, scale, smooth, waits, roundings: as the attributes of ``Case``; ``scale`` is that of every gradient.
        options: of the loss.
    """
    inputs = (first,) if teacher_fixed else (first, second)

    def call(inputs: tuple[Tensor, ...], backend: str | None) -> Outputs:
        sides = inputs if not teacher_fixed else (inputs[0], second.to(inputs[0].dtype))
        module = loss(**options, backend=backend)
        groups = {} if alignment is None else {"alignment": alignment}
        return (module(*sides, *which, token_weight=token_weight, num_items_in_batch=num_items_in_batch, **groups),)

    each = int(options.get("reduction") == "none")
    rows = 2 * each if loss in (DivergenceLoss, RankingLoss) else each  # their losses are rows'
    return Case(
        name,
        inputs,
        call,
        lambda inputs: call(inputs, "reference"),
        input_rows=(2,) * len(inputs),
        output_rows=(rows,),
        batch_dimensions=(0,) * each,
        gradient_scale=lambda inputs: (scale,) * len(inputs),
        condition=condition,
        smooth=smooth,
        waits=waits,
        roundings=roundings,
    )
