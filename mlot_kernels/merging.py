"""Groups of tokens as rows: how each group of an ``Alignment`` becomes one distribution of either side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.alignment import Alignment
from mlot_kernels.rows import Pairing, Rows

STRATEGIES = ("observed", "bayesian", "first")


@dataclass(frozen=True, eq=False)
class Factors:
    """Rows whose token's probability multiplies a merged row; ``F`` is the most that a sequence may have.

    Attributes:
        rows: the rows, in the order of their positions, ``index [B, F]``.
        tokens: ``[B, F]`` int64, the token of each; 0 beyond ``rows.count``.
        group: ``[B, F]`` int64, which merged row each belongs to, ascending; G beyond ``rows.count``.
    """

    rows: Rows
    tokens: Tensor
    group: Tensor

    def to(self, device: torch.device | str) -> Factors:
        """The same on another device."""
        return Factors(self.rows.to(device), self.tokens.to(device), self.group.to(device))


@dataclass(frozen=True, eq=False)
class MergedRows:
    """What the losses take as ``alignment``: one row of either side for each group, ``log_scale`` not yet made.

    Attributes:
        pairs: the rows that the merged ones are multiples of, paired group by group, ``index [B, G]``.
        student, teacher: what multiplies them; None where nothing does.
        coverage: ``[B]`` float32, as ``Alignment`` has it.
    """

    pairs: Pairing
    student: Factors | None
    teacher: Factors | None
    coverage: Tensor

    def to(self, device: torch.device | str) -> MergedRows:
        """The same on another device: a collator may align on the CPU."""
        student, teacher = (None if side is None else side.to(device) for side in (self.student, self.teacher))
        return MergedRows(self.pairs.to(device), student, teacher, self.coverage.to(device))


def merge_groups(
    alignment: Alignment,
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    *,
    strategy: str = "observed",
) -> MergedRows:
    """Say which row of logits stands for each group, and which tokens' probabilities multiply it.

    With p_l the distribution of a group's row for its token y_l, l = i..j::

        observed    p_i prod_{l > i} p_l(y_l), rows taken at the tokens' own positions: p_l predicts the token after y_l
        bayesian    p_j prod_{l < j} p_l(y_l), rows taken one position earlier: p_l predicts y_l (the chain rule)
        first       p_i alone, rows taken one position earlier

    The first two are those of TRL's ``uld_token_merge_strategy`` (``trl.experimental.gold`` 1.16), where ``"observed"``
    is the default; their rows sum to less than 1. Factors below 1e-8 count as that, as there, and get no gradient. With
    ``"bayesian"`` and ``"first"`` a sequence whose answer begins at position 0 of either side, where no row predicts
    its first token, loses its first group.

    Args:
        alignment: groups from ``align_byte_offsets``.
        student_ids, teacher_ids: ``[B, T]`` int32 or int64, the tokens of every position; ``"first"`` needs none.
        strategy: one of the above.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
    """
    if not isinstance(alignment, Alignment):
        raise TypeError(f"alignment must be an Alignment of align_byte_offsets, got {type(alignment).__name__}")
    checks.choice("strategy", strategy, STRATEGIES)
    tokens = alignment.student_tokens, alignment.teacher_tokens
    ids = []
    for name, value, rows in zip(("student_ids", "teacher_ids"), (student_ids, teacher_ids), tokens, strict=True):
        ids.append(None if strategy == "first" and value is None else _checked_ids(name, value, rows, strategy))
    shift = 0 if strategy == "observed" else 1
    count = alignment.count
    dropped = torch.zeros_like(count)
    if shift:
        for rows in tokens:
            at_first = (rows.index[:, :1] == 0).any(1)  # of no column, too
            dropped = dropped | at_first
        dropped = dropped & (count > 0)
    dropped = dropped.long()
    count = count - dropped
    bases, factors = [], []
    for first, rows, own in zip((alignment.student_first, alignment.teacher_first), tokens, ids, strict=True):
        base = first[:, 1:] - 1 if strategy == "bayesian" else first[:, :-1]  # [B, G], among the tokens that count
        bases.append(_base_rows(base, rows, dropped, count, shift))
        kept = None if strategy == "first" or own is None else _factors(first, base, rows, own, dropped, count, shift)
        factors.append(kept)
    slot = torch.arange(bases[0].index.shape[1], device=count.device).expand_as(bases[0].index)
    slot = slot.masked_fill(~bases[0].counted, 0)
    pairs = Pairing(bases[0], bases[1], slot, slot, torch.zeros_like(count, dtype=torch.bool))
    return MergedRows(pairs, factors[0], factors[1], alignment.coverage)


def _checked_ids(name: str, value: Tensor | None, rows: Rows, strategy: str) -> Tensor:
    if value is None:
        raise TypeError(
            f"{name} must be a tensor [B, T], got None: strategy {strategy!r} multiplies by its tokens' "
            "probabilities; pass the tokens, or strategy='first'"
        )
    checks.tensor(name, value, "[B, T]", checks.INTEGERS)
    checks.sized(name, value, (len(rows.index), rows.length), "[B, T] as the offsets that were aligned")
    checks.same_device(**{name: value, "alignment": rows.index})
    return value.long()


def _base_rows(base: Tensor, rows: Rows, dropped: Tensor, count: Tensor, shift: int) -> Rows:
    """The rows at the tokens ``base`` ``[B, G]``, without the first group where it is ``dropped`` ``[B]``."""
    B, G = base.shape
    slot = torch.arange(G, device=base.device).expand(B, G)
    behind = slot >= count[:, None]
    if G == 0:  # nothing to gather from
        nowhere = torch.full_like(slot, -1)
        return Rows(nowhere, count, nowhere.clone(), torch.ones_like(count), rows.length)
    token = base.gather(1, (slot + dropped[:, None]).clamp(max=G - 1)).masked_fill(behind, 0)
    index = (rows.index.gather(1, token) - shift).masked_fill(behind, -1)
    span = torch.zeros_like(slot).masked_fill(behind, -1)
    return Rows(index, count, span, torch.ones_like(count), rows.length)


def _factors(
    first: Tensor, base: Tensor, rows: Rows, ids: Tensor, dropped: Tensor, count: Tensor, shift: int
) -> Factors:
    """The rows of the groups' other tokens."""
    B, A = rows.index.shape
    G = base.shape[1]
    if G == 0:
        nothing = first.new_zeros(B, 0)
        return Factors(Rows(nothing, count, nothing, torch.ones_like(count), rows.length), nothing, nothing)
    token = torch.arange(A, device=first.device).expand(B, A).contiguous()
    group = torch.searchsorted(first[:, 1:].contiguous(), token, right=True)  # G behind the last one
    merged = group - dropped[:, None]
    inside = rows.counted & (merged >= 0) & (merged < count[:, None])
    inside &= token != base.gather(1, group.clamp(max=G - 1))
    order = (~inside).to(torch.uint8).argsort(dim=1, stable=True)
    number = inside.sum(1)
    behind = token >= number[:, None]
    position = rows.index.gather(1, order).masked_fill(behind, -1)
    span = torch.zeros_like(order).masked_fill(behind, -1)
    return Factors(
        Rows((position - shift).masked_fill(behind, -1), number, span, torch.ones_like(number), rows.length),
        ids.gather(1, position.clamp(min=0)).masked_fill(behind, 0),
        merged.gather(1, order).masked_fill(behind, G),
    )
