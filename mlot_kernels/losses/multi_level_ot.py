"""Multi-Level Optimal Transport (AAAI 2025, arXiv 2412.14528): the loss as the paper defines it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.logits import Logits, Ranked
from mlot_kernels.losses.common import (
    AlignedLoss,
    at_rows,
    check_backend,
    check_reduction,
    reduce,
    teacher_vocabulary,
    two_sides,
    vocabulary,
    weighted,
)
from mlot_kernels.losses.merged import coverage, merged_rows, rows_to_compare
from mlot_kernels.losses.teacher_ranks import rank_teacher
from mlot_kernels.merging import MergedRows
from mlot_kernels.ops.match_columns import match_columns
from mlot_kernels.ops.rank_truncate import gather_columns, rank_truncate
from mlot_kernels.ops.rank_truncate.reference import SCOPES
from mlot_kernels.ops.transport_cost import transport_cost
from mlot_kernels.rows import Pairing, Rows, gather_rows, pair
from mlot_kernels.teachers import Teacher, by_position
from mlot_kernels.transport import MARGINALS

if TYPE_CHECKING:
    from mlot_kernels.losses.official_multi_level_ot import OfficialMultiLevelOTLoss

MATCHINGS = ("sum", "greedy", "optimal")


def multi_level_ot_loss(
    student_logits: Tensor,
    teacher_logits: Teacher,
    student_labels: Tensor | Rows | None = None,
    teacher_labels: Tensor | Rows | None = None,
    *,
    alignment: MergedRows | None = None,
    k: int = 50,
    scope: str = "sequence",
    matching: str = "sum",
    absolute_weight: float = 1.0,
    logarithmic_weight: float = 0.1,
    transport_weight: float = 0.1,
    transport_temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    marginals: str = "unit",
    shift: int = 1,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    token_weight: Tensor | None = None,
    return_components: bool = False,
    backend: str | None = None,
) -> Any:
    """The Multi-Level-OT loss of the paper; the defaults are the paper's.

    Both sides are softmaxed at temperature 1, each keeps the k columns with the largest sums over its own counted rows,
    and nothing is renormalised. With t and s the kept probabilities of paired rows, per sequence::

        absolute_difference = sum_rows sum_k |t - s|                       (Eq. 14)
        logarithmic         = -sum_rows sum_k t log s                      (Eq. 16)
        transport           = <P, C>,  C_ij = sum_k |t'_i - s'_j|          (Eq. 20)
        loss = absolute_difference + 0.1 logarithmic + 0.1 transport

    where t', s' are the probabilities of all rows at the same columns at temperature 2, and P comes from Sinkhorn's
    iteration on C with rows = teacher, columns = student. Neither alpha = 0.15 nor the cross-entropy is inside.

    Args:
        student_logits: ``[B, T_s, V_s]``, teacher_logits: ``[B, T_t, V_t]``; float16, bfloat16, float32 or float64, the
            two may differ in everything but B. Lower precisions are computed in float32. Instead of its logits the
            teacher may be ``TeacherHidden``, of which one sequence's logits exist at a time (not for scope
            ``"batch"``), or ``TeacherTopK`` with columns, tail ``"renormalize"`` or ``"uniform"``, and
            ``teacher_vocab_size``; with scope ``"token"`` k is at most its K.
        student_labels, teacher_labels: which rows count: integers ``[B, T]`` (-100 is ignored), a bool mask ``[B, T]``,
            ``Rows``, or None for all. Row i of answer span r on one side is paired with row i of span r on the other; a
            sequence whose two sides have different numbers of spans gives NaN.
        alignment: compare groups of tokens, see ``merge_groups``, instead of rows by their position: these are then all
            rows there are, the factors are taken at temperature 1, there are no labels beside it, the teacher comes as
            logits, and a merged row has the ``token_weight`` of the row that it is a multiple of.
        k: columns kept; at most the smaller vocabulary, to which it is lowered.
        scope: what is ranked together: ``"sequence"``, ``"batch"`` or ``"token"``, see ``rank_truncate``.
        matching: how the student's columns meet the teacher's k, which are those with the largest sums over all its
            counted rows. ``"sum"``: each side in the order of its own sums. ``"greedy"``, ``"optimal"``: those whose
            probabilities are nearest over the paired rows, see ``match_columns``; with scope ``"sequence"`` only.
            Both approximate the paper's Eq. 11, which permutes the whole vocabulary at the least cost. ``"optimal"``
            gives the least ``absolute_difference`` for the teacher's columns; it needs SciPy and waits for the device.
        absolute_weight, logarithmic_weight, transport_weight: of the three terms.
        transport_temperature: of the transport term's features.
        epsilon, iterations, marginals: of the transport term, see ``sinkhorn``.
        shift: how far integer labels lie behind the rows that predict them: 1 as a model takes them, 0 for shifted
            ones.
        student_vocab_size, teacher_vocab_size: columns from here on are padding and take no part; None: all count.
        reduction: ``"none"`` ``[B]``, ``"sum"``, or ``"mean"`` over the sequences that have a counted pair.
        num_items_in_batch: replaces the mean's denominator, which counts sequences: for gradient accumulation pass the
            number of sequences of all micro-batches, not that of their tokens.
        token_weight: ``[B, T_s]``, weights of the student's positions: multiplies each paired row of the first two
            terms and each student column of the transport term.
        return_components: also return a dict of detached scalars: ``absolute_difference``, ``logarithmic`` and
            ``transport`` before their weights, reduced as the mean; ``student_mass`` and ``teacher_mass``, the mean
            kept probability of a counted row; ``coverage``, the mean part of a student's tokens in groups that end at a
            common byte, 1 without an alignment; ``rows``, the number of paired rows.
        backend: run all operators on this backend or raise.

    Returns:
        The loss, float32 (float64 where either side is float64), differentiable with respect to both sides' logits; or
        ``(loss, components)``.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    _check_options(
        k,
        scope,
        matching,
        absolute_weight,
        logarithmic_weight,
        transport_weight,
        transport_temperature,
        epsilon,
        iterations,
        marginals,
        shift,
    )
    check_reduction(reduction, num_items_in_batch)
    if alignment is None:
        two_sides(student_logits, teacher_logits, token_weight)
        student_rows = Rows.of(student_labels, student_logits, shift=shift, name="student_labels")
        teacher_rows = Rows.of(teacher_labels, by_position(teacher_logits), shift=shift, name="teacher_labels")
        pairs = pair(student_rows, teacher_rows)
    else:
        pairs = rows_to_compare(
            student_logits, teacher_logits, student_labels, teacher_labels, shift, alignment, token_weight
        )
        student_rows, teacher_rows = pairs.student, pairs.teacher
    V_s = vocabulary("student_vocab_size", student_vocab_size, student_logits)
    V_t = teacher_vocabulary(teacher_vocab_size, teacher_logits)
    if V_t is None:
        raise ValueError("a TeacherTopK needs teacher_vocab_size, whose columns are ranked, got None; pass it")

    z_s = Logits(student_logits, student_rows, vocab_size=V_s)
    also_at = (transport_temperature,)
    kept = min(k, V_s, V_t)
    if alignment is None:
        teacher = rank_teacher(
            teacher_logits, teacher_rows, k=kept, scope=scope, also_at=also_at, vocab_size=V_t, backend=backend
        )
    else:
        assert isinstance(teacher_logits, Tensor)
        z_s = merged_rows(z_s, alignment.student, backend)
        z_t = merged_rows(Logits(teacher_logits, teacher_rows, vocab_size=V_t), alignment.teacher, backend)
        teacher = rank_truncate(z_t, k=kept, scope=scope, also_at=also_at, backend=backend)
    if matching == "sum":
        student = rank_truncate(z_s, k=kept, scope=scope, also_at=also_at, backend=backend)
    else:
        paired_teacher = teacher._replace(
            log_probabilities=gather_rows(teacher.log_probabilities[0], pairs.teacher_slot)[None]
        )
        columns = match_columns(replace(z_s, rows=pairs.student), paired_teacher, method=matching, backend=backend)
        # -1 stands for a NaN, which shows by itself at any column, and there in the gradient, too.
        student = gather_columns(z_s, columns.clamp(min=0), also_at=also_at, backend=backend)
    absolute, logarithmic = _paired_terms(student, teacher, pairs, token_weight)  # [B]
    transport = transport_cost(
        teacher.log_probabilities[1].exp(),
        student.log_probabilities[1].exp(),
        metric="l1",
        epsilon=epsilon,
        iterations=iterations,
        marginals=marginals,
        row_lengths=teacher_rows.count,
        column_lengths=student_rows.count,
        column_weight=at_rows(token_weight, student_rows, absolute),
        backend=backend,
    ).cost

    paired = pairs.student.count > 0
    terms = [term.masked_fill(~paired, 0) for term in (absolute, logarithmic, transport)]
    per_sequence = absolute_weight * terms[0] + logarithmic_weight * terms[1] + transport_weight * terms[2]
    # A factor, not a summand: the gradient of a mismatched sequence must show it, too.
    per_sequence = per_sequence + transport * torch.zeros_like(transport).masked_fill(pairs.mismatched, float("nan"))
    loss = reduce(per_sequence, paired, reduction, num_items_in_batch)
    if not return_components:
        return loss
    reduced = (reduce(term.detach(), paired, "mean", num_items_in_batch) for term in terms)
    components = dict(zip(("absolute_difference", "logarithmic", "transport"), reduced, strict=True))
    for name, ranked, rows in (("student_mass", student, student_rows), ("teacher_mass", teacher, teacher_rows)):
        components[name] = reduce(ranked.kept_mass.detach(), rows.counted, "mean")
    components["coverage"] = coverage(alignment, paired)
    components["rows"] = pairs.student.count.sum()
    return loss, components


def _check_options(
    k: int,
    scope: str,
    matching: str,
    absolute_weight: float,
    logarithmic_weight: float,
    transport_weight: float,
    transport_temperature: float,
    epsilon: float,
    iterations: int,
    marginals: str,
    shift: int,
) -> None:
    checks.integer("k", k, 1)
    checks.choice("scope", scope, SCOPES)
    checks.choice("matching", matching, MATCHINGS)
    if matching != "sum" and scope != "sequence":
        raise ValueError(
            f"matching={matching!r} matches the columns of a sequence, got scope={scope!r}; "
            "pass scope='sequence' or matching='sum'"
        )
    checks.number("absolute_weight", absolute_weight)
    checks.number("logarithmic_weight", logarithmic_weight)
    checks.number("transport_weight", transport_weight)
    checks.number("transport_temperature", transport_temperature, above=0)
    checks.number("epsilon", epsilon, above=0)
    checks.integer("iterations", iterations, 1)
    checks.choice("marginals", marginals, MARGINALS)
    checks.integer("shift", shift, 0)


def _paired_terms(
    student: Ranked, teacher: Ranked, pairs: Pairing, token_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``sum |t - s|`` and ``-sum t log s`` over the paired rows and the k columns, ``[B]`` each."""
    log_s = gather_rows(student.log_probabilities[0], pairs.student_slot)  # [B, A, k]
    log_t = gather_rows(teacher.log_probabilities[0], pairs.teacher_slot)
    s, t = log_s.exp(), log_t.exp()
    absolute = (t - s).abs().sum(-1)  # [B, A]
    logarithmic = -torch.where(t == 0, 0, t * log_s.masked_fill(t == 0, 0)).sum(-1)  # 0 * -inf is 0 here
    weight = at_rows(token_weight, pairs.student, absolute)
    unpaired = ~pairs.student.counted
    absolute, logarithmic = (weighted(term.masked_fill(unpaired, 0), weight) for term in (absolute, logarithmic))
    return absolute.sum(1), logarithmic.sum(1)


class MultiLevelOTLoss(AlignedLoss):
    """The Multi-Level-OT loss; the options are those of ``multi_level_ot_loss``, and their defaults the paper's.

    ``MultiLevelOTLoss.paper()`` is the default by name; ``MultiLevelOTLoss.official()`` is what the published code
    computes, for those who must reproduce it.
    """

    def __init__(
        self,
        *,
        k: int = 50,
        scope: str = "sequence",
        matching: str = "sum",
        absolute_weight: float = 1.0,
        logarithmic_weight: float = 0.1,
        transport_weight: float = 0.1,
        transport_temperature: float = 2.0,
        epsilon: float = 0.1,
        iterations: int = 20,
        marginals: str = "unit",
        shift: int = 1,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        _check_options(
            k,
            scope,
            matching,
            absolute_weight,
            logarithmic_weight,
            transport_weight,
            transport_temperature,
            epsilon,
            iterations,
            marginals,
            shift,
        )
        check_reduction(reduction)
        check_backend(backend)
        super().__init__(
            multi_level_ot_loss,
            k=k,
            scope=scope,
            matching=matching,
            absolute_weight=absolute_weight,
            logarithmic_weight=logarithmic_weight,
            transport_weight=transport_weight,
            transport_temperature=transport_temperature,
            epsilon=epsilon,
            iterations=iterations,
            marginals=marginals,
            shift=shift,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
            reduction=reduction,
            backend=backend,
        )

    @classmethod
    def paper(
        cls,
        *,
        shift: int = 1,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> MultiLevelOTLoss:
        """The loss as the paper defines it; the options are those that its definition leaves open."""
        return cls(
            shift=shift,
            student_vocab_size=student_vocab_size,
            teacher_vocab_size=teacher_vocab_size,
            reduction=reduction,
            backend=backend,
        )

    @staticmethod
    def official(
        revision: str = "712cfb4",
        matching: str = "sum",
        skip_student_eos: bool = False,
        skip_teacher_eos: bool = False,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        **options: Any,
    ) -> OfficialMultiLevelOTLoss:
        """What the published code computes at ``revision``, with every defect that changes a value.

        All options are those of ``OfficialMultiLevelOTLoss``.
        """
        from mlot_kernels.losses.official_multi_level_ot import OfficialMultiLevelOTLoss

        return OfficialMultiLevelOTLoss(
            revision=revision,
            matching=matching,
            skip_student_eos=skip_student_eos,
            skip_teacher_eos=skip_teacher_eos,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            **options,
        )
