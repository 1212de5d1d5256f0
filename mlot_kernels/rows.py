"""Which positions of ``[B, T, V]`` count, and which of two sides' positions belong together.

Everything here runs on the tensors' device without waiting for it: shapes depend on ``T`` alone, and what depends on
the labels stays in tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlot_kernels import checks


@dataclass(frozen=True, eq=False)
class Rows:
    """The counted rows of each sequence, in the order of their positions.

    Make one with ``Rows.from_labels``, ``from_mask``, ``from_lengths`` or ``every``.

    Attributes:
        index: ``[B, A]`` int64, the position in ``0..T-1`` of the a-th counted row; -1 beyond the last one.
        count: ``[B]`` int64, how many rows count.
        span: ``[B, A]`` int64, which answer span, from 0 on, the a-th counted row belongs to; -1 beyond the last one.
        spans: ``[B]`` int64, how many answer spans there are, empty ones included.
        length: T of the sequences that ``index`` points into.
    """

    index: Tensor
    count: Tensor
    span: Tensor
    spans: Tensor
    length: int

    @property
    def counted(self) -> Tensor:
        """``[B, A]`` bool, True in front of the -1s."""
        return self.index >= 0

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        index, count, span, spans = (x.to(device) for x in (self.index, self.count, self.span, self.spans))
        return Rows(index, count, span, spans, self.length)

    def check_length(self, length: int, name: str, what: str) -> None:
        """Raise where these rows were not made for sequences of ``length`` positions."""
        if self.length != length:
            raise ValueError(f"{name} are rows of sequences of {self.length} positions, but {what} have {length}")

    @staticmethod
    def from_labels(labels: Tensor, *, shift: int = 1, ignore_index: int = -100, spans: str = "runs") -> Rows:
        """Rows whose label counts.

        Args:
            labels: ``[B, T]`` integers; ``ignore_index`` where a token is not learned.
            shift: how far a label lies behind the row that predicts it. 1: labels as a model takes them, row i predicts
                token i + 1, the last row predicts none. 0: labels that are shifted already.
            spans: ``"runs"``: every run of adjacent rows is an answer span (the turns of a dialogue); ``"one"``: all
                rows of a sequence are one span, whatever lies between them.
        """
        checks.tensor("labels", labels, "[B, T]", checks.INTEGERS)
        shift = min(checks.integer("shift", shift, 0), labels.shape[1])
        counted = labels != checks.integer("ignore_index", ignore_index, -(2**63))
        if shift:
            counted = torch.cat((counted[:, shift:], counted.new_zeros(counted.shape[0], shift)), 1)
        return Rows.from_mask(counted, spans=spans)

    @staticmethod
    def from_mask(mask: Tensor, *, spans: str = "runs") -> Rows:
        """The rows, named as they are, where ``mask`` ``[B, T]`` (bool) is True; ``spans`` as in ``from_labels``."""
        checks.tensor("mask", mask, "[B, T]", (torch.bool,))
        checks.choice("spans", spans, ("runs", "one"))
        # A stable sort moves the counted positions to the front: deterministic, where a scatter on a GPU need not be.
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # [B, T]
        count = mask.sum(1)
        behind = torch.arange(mask.shape[1], device=mask.device) >= count[:, None]
        if spans == "one":
            span, number = torch.zeros_like(order), torch.ones_like(count)
        else:
            first = mask.clone()
            first[:, 1:] &= ~mask[:, :-1]
            span, number = (first.cumsum(1) - 1).gather(1, order), first.sum(1)
        return Rows(order.masked_fill(behind, -1), count, span.masked_fill(behind, -1), number, mask.shape[1])

    @staticmethod
    def from_lengths(starts: Tensor, lengths: Tensor, width: int) -> Rows:
        """The rows ``starts .. starts + lengths - 1`` of sequences of ``width`` positions, named as they are.

        Args:
            starts, lengths: ``[B]`` or, for several spans a sequence, ``[B, S]`` integers; spans in ascending order
                that do not overlap; an empty one (length 0) still counts as a span. Positions outside ``0..width-1``
                are left out.
        """
        checks.tensor("starts", starts, "[B] or [B, S]", checks.INTEGERS)
        checks.tensor("lengths", lengths, "[B] or [B, S]", checks.INTEGERS)
        checks.sized("lengths", lengths, starts.shape, "of the shape of starts")
        checks.same_device(starts=starts, lengths=lengths)
        checks.integer("width", width, 0)
        if starts.dim() == 2:
            checks.integer("the number of spans, starts.shape[1],", starts.shape[1], 1)
        starts, lengths = (x if x.dim() == 2 else x[:, None] for x in (starts, lengths))
        position = torch.arange(width, device=starts.device)[:, None]
        inside = (position >= starts[:, None]) & (position < (starts + lengths)[:, None])  # [B, width, S]
        rows = Rows.from_mask(inside.any(2), spans="one")
        which = inside.to(torch.uint8).argmax(2).gather(1, rows.index.clamp(min=0))
        spans = torch.full_like(rows.count, starts.shape[1])
        return Rows(rows.index, rows.count, which.masked_fill(~rows.counted, -1), spans, width)

    @staticmethod
    def every(batch: int, length: int, device: torch.device | str | None = None) -> Rows:
        """All rows of ``[batch, length, V]``, one span a sequence."""
        index = torch.arange(length, device=device).expand(batch, length).contiguous()
        count = torch.full((batch,), length, device=device)
        return Rows(index, count, torch.zeros_like(index), torch.ones_like(count), length)

    @staticmethod
    def of(value: Any, logits: Tensor, *, shift: int, name: str) -> Rows:
        """What a loss accepts as labels, as rows of ``logits`` ``[B, T, V]``.

        Args:
            value: integers ``[B, T]`` (``shift`` applies), a bool mask ``[B, T]``, Rows, or None for all rows.
            name: the argument's name, for messages.
        """
        B, T = logits.shape[:2]
        checks.integer("shift", shift, 0)
        if value is None:
            return Rows.every(B, T, logits.device)
        if isinstance(value, Rows):
            checks.sized(f"{name}.count", value.count, (B,), "[B] as its logits")
            value.check_length(T, name, "its logits")
        else:
            checks.tensor(name, value, "[B, T]", (*checks.INTEGERS, torch.bool))
            checks.sized(name, value, (B, T), "[B, T] as its logits")
        checks.same_device(**{name: value.index if isinstance(value, Rows) else value, "its logits": logits})
        if isinstance(value, Rows):
            return value
        return Rows.from_mask(value) if value.dtype == torch.bool else Rows.from_labels(value, shift=shift)


class Pairing(NamedTuple):
    """Rows of two sides, matched one to one.

    Attributes:
        student, teacher: each side's rows, cut to the matched ones: the same ``count``, and the student's width A.
        student_slot, teacher_slot: ``[B, A]`` int64, where among its side's counted rows the p-th pair's row stands,
            for gathering from ``[B, A, ...]`` outputs of operators that ran over all counted rows; 0 beyond ``count``.
        mismatched: ``[B]`` bool, rows count on both sides, but in different numbers of spans; such a sequence has no
            pair. A side on which nothing counts, an answer that was cut off, is no mismatch: there is nothing to pair.
    """

    student: Rows
    teacher: Rows
    student_slot: Tensor
    teacher_slot: Tensor
    mismatched: Tensor

    def to(self, device: torch.device | str) -> Pairing:
        """The same rows on another device."""
        slots = self.student_slot.to(device), self.teacher_slot.to(device)
        return Pairing(self.student.to(device), self.teacher.to(device), *slots, self.mismatched.to(device))


def pair(student_rows: Rows, teacher_rows: Rows, *, check: bool = False) -> Pairing:
    """Match row i of span r on one side with row i of span r on the other, up to the end of the shorter span.

    Args:
        check: raise where a sequence is mismatched. Waits for the device; without it losses give such a sequence NaN.

    Raises:
        ValueError: the batch sizes or devices differ, or ``check`` and a sequence has a different number of spans on
            its two sides.
    """
    checks.sized("teacher_rows.count", teacher_rows.count, student_rows.count.shape, "[B] as student_rows")
    checks.same_device(student_rows=student_rows.index, teacher_rows=teacher_rows.index)
    both = (student_rows.count > 0) & (teacher_rows.count > 0)
    mismatched = (student_rows.spans != teacher_rows.spans) & both
    if check and bool(mismatched.any()):
        b = int(mismatched.nonzero()[0])
        raise ValueError(
            f"sequence {b} has {int(student_rows.spans[b])} answer spans on the student's side and "
            f"{int(teacher_rows.spans[b])} on the teacher's; mask the labels of a span on both sides, or pass rows "
            "made with spans='one' to pair rows in their order"
        )

    student_start, _ = _bounds(student_rows, student_rows.span)
    teacher_start, teacher_end = _bounds(teacher_rows, student_rows.span)
    slot = torch.arange(student_rows.index.shape[1], device=student_rows.index.device)  # [A]
    partner = slot - student_start + teacher_start  # [B, A]
    matched = student_rows.counted & (partner < teacher_end) & ~mismatched[:, None]

    order = (~matched).to(torch.uint8).argsort(dim=1, stable=True)
    count = matched.sum(1)
    behind = slot >= count[:, None]
    student_slot = order.masked_fill(behind, 0)
    teacher_slot = partner.gather(1, order).masked_fill(behind, 0)
    return Pairing(
        _cut(student_rows, student_slot, count, behind),
        _cut(teacher_rows, teacher_slot, count, behind),
        student_slot,
        teacher_slot,
        mismatched,
    )


def _bounds(rows: Rows, span: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of ``rows`` at which each of the spans ``span [B, A]`` begins and ends."""
    ascending = rows.span.masked_fill(~rows.counted, torch.iinfo(torch.int64).max).contiguous()
    span = span.contiguous()
    return torch.searchsorted(ascending, span), torch.searchsorted(ascending, span, right=True)


def _cut(rows: Rows, slot: Tensor, count: Tensor, behind: Tensor) -> Rows:
    if rows.index.shape[1] == 0:  # nothing to gather from, and so nothing matched
        nowhere = torch.full_like(slot, -1)
        return Rows(nowhere, count, nowhere.clone(), rows.spans, rows.length)
    index, span = (x.gather(1, slot).masked_fill(behind, -1) for x in (rows.index, rows.span))
    return Rows(index, count, span, rows.spans, rows.length)


def gather_rows(x: Tensor, position: Tensor) -> Tensor:
    """``x`` ``[B, T, K]`` at ``position`` ``[B, n]``, ``[B, n, K]``; -1 and any position of no rows mean nothing."""
    if x.shape[1] == 0:
        return x.new_zeros(*position.shape, x.shape[2])
    return x.gather(1, position.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
