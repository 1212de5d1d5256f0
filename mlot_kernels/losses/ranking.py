"""Ranking-loss distillation (arXiv 2409.12545): 1 - the correlation of soft ranks of the columns that matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.logits import Logits
from mlot_kernels.losses.common import (
    LogitsLoss,
    check_backend,
    check_reduction,
    paired_rows,
    reduce,
    teacher_vocabulary,
    two_sides,
    vocabulary,
    weight_of_rows,
    weighted,
)
from mlot_kernels.losses.divergence import divergences
from mlot_kernels.losses.entries import entries_and_values
from mlot_kernels.losses.teacher_ranks import top_of_teacher
from mlot_kernels.ops.row_divergence.reference import KINDS
from mlot_kernels.ops.soft_rank import soft_rank
from mlot_kernels.ops.topk_softmax import topk_softmax
from mlot_kernels.rows import Pairing, Rows
from mlot_kernels.teachers import Teacher

SPACES = ("logits", "probabilities")
DEDUPLICATIONS = ("exact", "official")


def ranking_loss(
    student_logits: Tensor,
    teacher_logits: Teacher,
    student_labels: Tensor | Rows | None = None,
    teacher_labels: Tensor | Rows | None = None,
    *,
    k: int = 10,
    space: str = "logits",
    dedup: str = "exact",
    epsilon: float = 1.0,
    ranking_weight: float = 1.0,
    base: str | None = None,
    base_weight: float = 1.0,
    dynamic: bool = False,
    beta: float = 0.5,
    skew: float = 0.1,
    head: float = 0.5,
    shift: int = 1,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    token_weight: Tensor | None = None,
    return_components: bool = False,
    backend: str | None = None,
) -> Any:
    """1 - the correlation of both sides' soft ranks over the union of their top-k; the mean is over tokens.

    For each paired row, with U the columns that are among the k largest of either side and R the soft ranks of a side's
    values there::

        ranking = 1 - cov(R_teacher, R_student) / (std(R_teacher) std(R_student))                            (Eq. 1)
        loss    = ranking_weight * ranking + base_weight * base                    the paper: 2 ranking + base

    A union of one column gives 0. Where all of a side's ranks are the same there is no correlation: 1, and gradient 0.

    Args:
        student_logits: ``[B, T_s, V]``, teacher_logits: ``[B, T_t, V]``; float16, bfloat16, float32 or float64, the two
            may differ in T and dtype. One vocabulary. Lower precisions are computed in float32. Instead of its logits
            the teacher may be ``TeacherHidden`` or ``TeacherTopK`` with columns, k at most its K and tail
            ``"renormalize"``, under which what it does not know ranks last, or ``"uniform"``.
        student_labels, teacher_labels: which rows count: integers ``[B, T]`` (-100 is ignored), a bool mask ``[B, T]``,
            ``Rows``, or None for all. Row i of answer span r on one side is paired with row i of span r on the other; a
            sequence whose two sides have different numbers of spans gives NaN.
        k: of the top-k; at most V, to which it is lowered.
        space: what is ranked: ``"logits"``, as the published code does, or ``"probabilities"``, as the paper's text
            says. Those are nearer than ``epsilon=1`` to one another, so that every rank is linear in them: the loss is
            then exactly 1 - Pearson's correlation of the probabilities, which the paper's Table 8 has as another, and
            worse, method.
        dedup: ``"exact"``: a column that both sides rank is in the union once. ``"official"``: twice, as in the
            published code for more than one row.
        epsilon: of ``soft_rank``: values at least this far apart have ordinary ranks, and no gradient.
        ranking_weight, base_weight: of the two terms.
        base: a kind of ``row_divergence`` over the whole rows, to be added; None: nothing is.
        dynamic: multiply the base of each row by the part of the k columns that both sides rank (Eq. 2, which the paper
            has for the forward and the reverse KL).
        beta, skew, head: of the base, see ``row_divergence``.
        shift: how far integer labels lie behind the rows that predict them: 1 as a model takes them, 0 for shifted
            ones.
        student_vocab_size, teacher_vocab_size: columns from here on are padding and take no part; None: all count.
        reduction: ``"none"`` ``[B, A]`` over the paired rows, ``"sum"``, or ``"mean"`` over them.
        num_items_in_batch: replaces the mean's denominator, which counts tokens, or adds up their weights.
        token_weight: ``[B, T_s]``, weights of the student's positions, which multiply and are the mean's.
        return_components: also return a dict of detached scalars, reduced as the mean: ``ranking`` and ``base`` before
            their weights, ``consistency_rate``, the part of rows whose two top-k are the same in the same order,
            ``overlap_rate``, the part of the k columns that both sides rank; and ``rows``, the number of paired rows.
        backend: run all operators on this backend or raise.

    Returns:
        The loss, float32 (float64 where either side is float64), differentiable with respect to both sides' logits (the
        choice of the union passes no gradient on); or ``(loss, components)``.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    _check_options(k, space, dedup, epsilon, ranking_weight, base, base_weight, dynamic, shift)
    check_reduction(reduction, num_items_in_batch)
    two_sides(student_logits, teacher_logits, token_weight)
    V = vocabulary("student_vocab_size", student_vocab_size, student_logits)
    V_t = teacher_vocabulary(teacher_vocab_size, teacher_logits) or V
    if V_t != V:
        raise ValueError(
            f"student and teacher must have vocabularies of one size, got {V} and {V_t}; take a loss for different "
            "vocabularies, such as ULDLoss or MultiLevelOTLoss"
        )
    pairs = paired_rows(student_logits, teacher_logits, student_labels, teacher_labels, shift)
    ranks, student_logits = _ranks(student_logits, teacher_logits, pairs, V, min(k, V), space, dedup, epsilon, backend)
    each = _one_less_correlation(ranks)  # [B, A]
    loss = ranking_weight * each
    added = torch.zeros_like(each)
    if base is not None:
        options = {"kind": base, "beta": beta, "skew": skew, "head": head, "interpolation": 1.0, "column_pairs": None}
        student = Logits(student_logits, pairs.student, vocab_size=V)
        added = divergences(student, teacher_logits, pairs, 1.0, V, {**options, "backend": backend})
        loss = loss + base_weight * (ranks.overlap * added if dynamic else added)
    weight = weight_of_rows(token_weight, pairs.student, each)
    loss = weighted(loss, weight).masked_fill(pairs.mismatched[:, None], float("nan"))
    loss = reduce(loss, weight, reduction, num_items_in_batch)
    if not return_components:
        return loss
    parts = {"ranking": each, "base": added, "consistency_rate": ranks.consistent, "overlap_rate": ranks.overlap}
    return loss, {
        **{
            name: reduce(weighted(part.detach(), weight), weight, "mean", num_items_in_batch)
            for name, part in parts.items()
        },
        "rows": pairs.student.count.sum(),
    }


class _Ranks(NamedTuple):
    """Of each pair of rows the soft ranks over the union of their top-k, less their mean; 0 beyond it."""

    student: Tensor  # [B, A, 2 k]
    teacher: Tensor  # [B, A, 2 k]
    flat: Tensor  # [B, A], whether all ranks of a side are the same
    length: Tensor  # [B, A], of the union; 0 where no row counts
    consistent: Tensor  # [B, A], 1 where both top-k are the same in the same order
    overlap: Tensor  # [B, A], the part of the k columns that are in both


def _ranks(
    student_logits: Tensor,
    teacher: Teacher,
    pairs: Pairing,
    vocab_size: int,
    k: int,
    space: str,
    dedup: str,
    epsilon: float,
    backend: str | None,
) -> tuple[_Ranks, Tensor]:
    """And the student's logits to read from here on, whose gradients meet in one tensor."""
    rows, last = pairs.student, student_logits.shape[2] - 1
    student = Logits(student_logits, rows, vocab_size=vocab_size)
    # What is chosen is a constant, and the normaliser is one where it is not used.
    fixed = replace(student, values=student_logits.detach()) if space == "logits" else student
    own = topk_softmax(fixed, k, backend=backend)
    own_columns = own.columns.clamp(0, last)  # a row with NaN has any
    top = top_of_teacher(teacher, pairs.teacher, own_columns, vocab_size=vocab_size, backend=backend)
    union = torch.cat((top.columns, own_columns), -1)  # [B, A, 2 k]
    same = (own_columns[..., None] == top.columns[..., None, :]).to(torch.uint8)  # [B, A, k, k]
    twice = (same.amax(-1) > 0) & rows.counted[..., None]  # [B, A, k]
    z_s, rest = entries_and_values(student_logits, rows.index, union.clamp(0, last))
    z_t = top.values
    if dedup == "official":  # by one of its two entries, so that its gradient is added up before it is rounded
        z_s = torch.cat((z_s[..., :k], torch.where(twice, z_s.gather(-1, same.argmax(-1)), z_s[..., k:])), -1)

    # What is there already goes behind the end, and so do columns that a top-k of fewer than k does not have.
    left_out = torch.cat((top.columns >= vocab_size, twice & (dedup == "exact")), -1)
    order = left_out.to(torch.uint8).argsort(dim=-1, stable=True)
    z_s, z_t = z_s.gather(-1, order), z_t.gather(-1, order)
    length = (2 * k - left_out.sum(-1)) * rows.counted
    # The columns of a row with NaN need not hold it.
    z_s, z_t = (z + (lse.detach() * 0)[..., None] for z, lse in ((z_s, own.lse), (z_t, top.lse)))
    if space == "probabilities":
        z_s, z_t = (z_s - own.lse[..., None]).exp(), (z_t - top.lse[..., None]).exp()
    counts = torch.arange(2 * k, device=length.device) < length[..., None]
    if space == "probabilities" and epsilon >= 1:  # ranks are linear in them, and lose digits to their own mean
        ranks = [z / epsilon for z in (z_s, z_t)]
        middles = [(rank.masked_fill(~counts, 0).sum(-1) / length.clamp(min=1))[..., None] for rank in ranks]
    else:
        ranks = [soft_rank(z, length, epsilon=epsilon, backend=backend) for z in (z_s, z_t)]
        middles = [((length + 1) / 2)[..., None]] * 2
    consistent = (own_columns == top.columns).all(-1)
    centred = [(rank - middle).masked_fill(~counts, 0) for rank, middle in zip(ranks, middles, strict=True)]
    made = _Ranks(
        centred[0],
        centred[1],
        _flat(ranks[0], counts) | _flat(ranks[1], counts),
        length,
        consistent.to(z_s.dtype),
        twice.sum(-1).to(z_s.dtype) / k,
    )
    return made, rest


def _one_less_correlation(ranks: _Ranks) -> Tensor:
    """1 - Pearson's correlation, ``[B, A]``."""
    s, t, flat = ranks.student, ranks.teacher, ranks.flat
    norm = torch.where(flat, 1, (s * s).sum(-1)).sqrt() * torch.where(flat, 1, (t * t).sum(-1)).sqrt()
    correlation = ((s * t).sum(-1) / norm).masked_fill(flat, 0)
    return torch.where(ranks.length <= 1, correlation * 0, 1 - correlation)


def _flat(ranks: Tensor, counts: Tensor) -> Tensor:
    """Whether all ranks are the same, ``[B, A]``; never so where one is NaN."""
    least, most = (ranks.detach().masked_fill(~counts, fill) for fill in (float("inf"), float("-inf")))
    return least.amin(-1) >= most.amax(-1)


def _check_options(
    k: int,
    space: str,
    dedup: str,
    epsilon: float,
    ranking_weight: float,
    base: str | None,
    base_weight: float,
    dynamic: bool,
    shift: int,
) -> None:
    checks.integer("k", k, 1)
    checks.choice("space", space, SPACES)
    checks.choice("dedup", dedup, DEDUPLICATIONS)
    checks.number("epsilon", epsilon, above=0)
    checks.number("ranking_weight", ranking_weight)
    checks.number("base_weight", base_weight)
    if base is not None:
        checks.choice("base", base, KINDS)
    if checks.boolean("dynamic", dynamic) and base is None:
        raise ValueError("dynamic=True weighs the base of each row, but base is None; name one, such as 'forward_kl'")
    checks.integer("shift", shift, 0)


class RankingLoss(LogitsLoss):
    """Ranking-loss distillation as a module; the options are those of ``ranking_loss``.

    By itself it is the ranking term alone. ``RankingLoss.paper()`` and ``RankingLoss.official()`` add a divergence.
    """

    def __init__(
        self,
        *,
        k: int = 10,
        space: str = "logits",
        dedup: str = "exact",
        epsilon: float = 1.0,
        ranking_weight: float = 1.0,
        base: str | None = None,
        base_weight: float = 1.0,
        dynamic: bool = False,
        beta: float = 0.5,
        skew: float = 0.1,
        head: float = 0.5,
        shift: int = 1,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        _check_options(k, space, dedup, epsilon, ranking_weight, base, base_weight, dynamic, shift)
        check_reduction(reduction)
        check_backend(backend)
        super().__init__(
            ranking_loss,
            k=k,
            space=space,
            dedup=dedup,
            epsilon=epsilon,
            ranking_weight=ranking_weight,
            base=base,
            base_weight=base_weight,
            dynamic=dynamic,
            beta=beta,
            skew=skew,
            head=head,
            shift=shift,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
            reduction=reduction,
            backend=backend,
        )

    @classmethod
    def paper(cls, base: str = "forward_kl", k: int = 5, **options: Any) -> RankingLoss:
        """2 x ranking + base over the exact union, the paper's objective; ``dynamic=True`` for its Eq. 2.

        All other options are those of ``RankingLoss``, but for the two weights.
        """
        return cls(k=k, base=base, ranking_weight=2.0, base_weight=1.0, **options)

    @classmethod
    def official(cls, base: str = "forward_kl", k: int = 5, **options: Any) -> RankingLoss:
        """ranking + base / 2 with duplicates kept, what the published code computes of more than one row.

        All other options are those of ``RankingLoss``, but for ``dedup`` and the two weights.
        """
        return cls(k=k, base=base, dedup="official", ranking_weight=1.0, base_weight=0.5, **options)
