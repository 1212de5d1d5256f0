"""The Multi-Level-OT loss as the published code computes it, for those who must reproduce its numbers.

It differs from the paper's in nearly every term; ``multi_level_ot.py`` has that one. The differences, all reproduced
here: each row is divided by its unbiased standard deviation + 1e-4; one ranking for the whole batch; the absolute
differences are averaged over the rows, not summed; the logarithmic term has its sides exchanged, softmaxes the kept
probabilities again and runs over zero rows up to the longest answer of the batch, too; the transport term softmaxes
them again at temperature 2, takes 10 iterations, counts zero rows, and is summed over the batch with a factor 0.001.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlot_kernels import checks
from mlot_kernels.logits import Logits, Ranked
from mlot_kernels.losses.common import LogitsLoss, check_backend, check_reduction, reduce, two_sides
from mlot_kernels.ops.match_columns import match_columns
from mlot_kernels.ops.rank_truncate import gather_columns, rank_truncate
from mlot_kernels.ops.transport_cost import transport_cost
from mlot_kernels.rows import Rows
from mlot_kernels.teachers import Teacher

REVISIONS = ("712cfb4", "d8d298f", "77e32ae")
MATCHINGS = ("sum", "greedy")
_KEPT = 50


def official_multi_level_ot_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor | Rows | None = None,
    teacher_labels: Tensor | Rows | None = None,
    *,
    revision: str = "712cfb4",
    matching: str = "sum",
    skip_student_eos: bool = False,
    skip_teacher_eos: bool = False,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    return_components: bool = False,
    backend: str | None = None,
) -> Any:
    """The distillation term of the published Multi-Level-OT code, ``mean(HAD) + 0.1 SL + 0.1 SD``.

    Its weight 1.5 and the cross-entropy are not inside. The value equals the published one on float32 logits; 16-bit
    logits are upcast here, where the published code rounds probabilities to 16 bits. Where the published code gives NaN
    or raises,
    rows count as zero rows: an empty answer has none of its own and an absolute difference of 0, and a side whose
    padded T is below the batch's longest answer is extended by zero rows.

    Args:
        student_logits: ``[B, T_s, V_s]``, teacher_logits: ``[B, T_t, V_t]``, as for ``multi_level_ot_loss``.
        student_labels, teacher_labels: integers ``[B, T]``, read as the published code reads them: one contiguous span
            whose first row is the last of the leading ``ignore_index`` (the first row of all where there are none), of
            as many rows as labels count. Or a bool mask, ``Rows``, or None, whose rows are taken as they are.
        revision: of the published repository. ``"712cfb4"`` (February 2026); ``"d8d298f"`` (April 2025), which first
            sorts every row by itself; ``"77e32ae"`` (first upload), which does that too and counts the transport term
            of the batch's last sample only.
        matching: ``"sum"``, the published ``f=1``: each side in the order of its own sums. ``"greedy"``, what ``f=2``
            was meant to be (as published, its loop over the teacher's columns runs over as many as there are rows, and
            takes from as many student columns): in each sample the teacher's 50 columns, in the order of the batch's
            ranking, take the free student column at the least distance, summed over the rows of both sides' answers,
            zero rows included; teacher columns beyond the student's vocabulary meet zeros. Revision 712cfb4 only.
        skip_student_eos, skip_teacher_eos: leave out each answer's last row on that side.
        student_temperature, teacher_temperature: of the softmaxes, after the division by the standard deviation.
        ignore_index: the label that does not count.
        reduction: ``"mean"`` over the batch is the published value; ``"none"`` ``[B]`` holds what it averages,
            ``"sum"`` adds that up.
        num_items_in_batch: replaces the mean's denominator B, which counts sequences, not tokens.
        return_components: also return a dict of detached scalars: ``absolute_difference`` (HAD), ``logarithmic`` (SL)
            and ``transport`` (SD) before their weights, ``student_mass`` and ``teacher_mass``, the mean kept
            probability of a counted row, and ``rows``, the number of rows of absolute differences.
        backend: run all operators on this backend or raise.

    Returns:
        The loss, float32 (float64 where either side is float64); or ``(loss, components)``.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    options = (revision, skip_student_eos, skip_teacher_eos, student_temperature, teacher_temperature, ignore_index)
    _check_options(*options)
    _check_matching(matching, revision)
    check_reduction(reduction, num_items_in_batch)
    two_sides(student_logits, teacher_logits, dense_because="the published code reads every column of every row")
    student_rows = _answer(student_labels, student_logits, ignore_index, skip_student_eos, "student")
    teacher_rows = _answer(teacher_labels, teacher_logits, ignore_index, skip_teacher_eos, "teacher")
    B = student_logits.shape[0]
    # The published code cuts both sides at the batch's longest answer; its shape must not depend on the labels here.
    width = max(student_rows.index.shape[1], teacher_rows.index.shape[1])
    longest = torch.cat((student_rows.count, teacher_rows.count)).amax() if B else student_rows.count.sum()

    z_s = Logits(student_logits, student_rows, temperature=student_temperature, standardize=True)
    z_t = Logits(teacher_logits, teacher_rows, temperature=teacher_temperature, standardize=True)
    scope = "batch" if revision == "712cfb4" else "token"
    teacher = rank_truncate(z_t, k=min(_KEPT, teacher_logits.shape[2]), scope=scope, backend=backend)
    if matching == "sum":
        student = rank_truncate(z_s, k=min(_KEPT, student_logits.shape[2]), scope=scope, backend=backend)
    else:
        student = _greedily_matched(z_s, student_rows, teacher, teacher_rows, backend)
    kept = max(student.columns.shape[-1], teacher.columns.shape[-1])
    s = _probabilities(student, student_rows, width, kept)
    t = _probabilities(teacher, teacher_rows, width, kept)
    position = torch.arange(width, device=s.device)
    shorter = torch.minimum(student_rows.count, teacher_rows.count)  # [B]
    difference = (s - t).abs().sum(-1).masked_fill(position >= shorter[:, None], 0)
    absolute = difference.sum(1) / shorter.clamp(min=1)

    cross = -(s.softmax(-1) * t.log_softmax(-1)).sum(-1).masked_fill(position >= longest, 0)
    logarithmic = cross.sum(1) / longest.clamp(min=1)

    lengths = longest.expand(B)
    transport = (
        0.001
        * transport_cost(
            (t / 2).softmax(-1),
            (s / 2).softmax(-1),
            metric="l1",
            epsilon=0.1,
            iterations=10,
            marginals="unit",
            row_lengths=lengths,
            column_lengths=lengths,
            backend=backend,
        ).cost
    )
    if revision == "77e32ae":
        transport = transport * (torch.arange(B, device=s.device) == B - 1)

    per_sample = absolute + 0.1 * logarithmic + 0.1 * B * transport
    everyone = torch.ones_like(shorter)
    loss = reduce(per_sample, everyone, reduction, num_items_in_batch)
    if not return_components:
        return loss
    return loss, {
        "absolute_difference": reduce(absolute.detach(), everyone, "mean", num_items_in_batch),
        "logarithmic": reduce(logarithmic.detach(), everyone, "mean", num_items_in_batch),
        "transport": reduce(B * transport.detach(), everyone, "mean", num_items_in_batch),
        "student_mass": reduce(student.kept_mass.detach(), student_rows.counted, "mean"),
        "teacher_mass": reduce(teacher.kept_mass.detach(), teacher_rows.counted, "mean"),
        "rows": shorter.sum(),
    }


def _check_options(
    revision: str,
    skip_student_eos: bool,
    skip_teacher_eos: bool,
    student_temperature: float,
    teacher_temperature: float,
    ignore_index: int,
) -> None:
    checks.choice("revision", revision, REVISIONS)
    checks.boolean("skip_student_eos", skip_student_eos)
    checks.boolean("skip_teacher_eos", skip_teacher_eos)
    checks.number("student_temperature", student_temperature, above=0)
    checks.number("teacher_temperature", teacher_temperature, above=0)
    checks.integer("ignore_index", ignore_index, -(2**63))


def _answer(labels: Any, logits: Tensor, ignore_index: int, skip_eos: bool, side: str) -> Rows:
    """The rows of one side's answer, without its last one under ``skip_eos``."""
    rows = Rows.of(labels, logits, shift=0, name=f"{side}_labels")
    if isinstance(labels, Tensor) and labels.dtype != torch.bool:  # as the published code reads labels
        ignored = labels == ignore_index
        leading = ignored.long().cumprod(1).sum(1)
        rows = Rows.from_lengths((leading - 1).clamp(min=0), (~ignored).sum(1), labels.shape[1])
    if not skip_eos:
        return rows
    count = (rows.count - 1).clamp(min=0)
    behind = torch.arange(rows.index.shape[1], device=count.device) >= count[:, None]
    index, span = (x.masked_fill(behind, -1) for x in (rows.index, rows.span))
    return Rows(index, count, span, rows.spans, rows.length)


def _greedily_matched(
    z_s: Logits, student_rows: Rows, teacher: Ranked, teacher_rows: Rows, backend: str | None
) -> Ranked:
    """The student at the columns that the teacher's take."""
    k = min(z_s.values.shape[2], teacher.columns.shape[1])
    log_t = teacher.log_probabilities[0, ..., :k].masked_fill(~teacher_rows.counted[..., None], float("-inf"))
    # Rows of the teacher alone cost every student column the same; a negative number pads by cutting them off.
    missing = student_rows.index.shape[1] - log_t.shape[1]
    log_t = nn.functional.pad(log_t, (0, 0, 0, missing), value=float("-inf"))
    zero_rows_too = Ranked(log_t[None], teacher.columns[:, :k], teacher.kept_mass)
    columns = match_columns(z_s, zero_rows_too, method="greedy", backend=backend)
    # -1 stands for a NaN, which shows by itself at any column, and there in the gradient, too.
    return gather_columns(z_s, columns.clamp(min=0), backend=backend)


def _probabilities(ranked: Ranked, rows: Rows, width: int, kept: int) -> Tensor:
    """``[B, width, kept]``, 0 where there is no row or column."""
    p = ranked.log_probabilities[0].exp().masked_fill(~rows.counted[..., None], 0)
    return nn.functional.pad(p, (0, kept - p.shape[2], 0, width - p.shape[1]))


def _check_matching(matching: str, revision: str) -> None:
    checks.choice("matching", matching, MATCHINGS)
    if matching == "greedy" and revision != "712cfb4":
        raise ValueError(
            f"matching='greedy' needs revision='712cfb4', got revision={revision!r}, which sorts every row by itself "
            "and has no columns to match; pass matching='sum'"
        )


class OfficialMultiLevelOTLoss(LogitsLoss):
    """The published code's loss as a module; the options are those of ``official_multi_level_ot_loss``.

    ``token_weight`` is refused: the published loss has none.
    """

    def __init__(
        self,
        *,
        revision: str = "712cfb4",
        matching: str = "sum",
        skip_student_eos: bool = False,
        skip_teacher_eos: bool = False,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        options = (revision, skip_student_eos, skip_teacher_eos, student_temperature, teacher_temperature, ignore_index)
        _check_options(*options)
        _check_matching(matching, revision)
        check_reduction(reduction)
        check_backend(backend)
        super().__init__(
            official_multi_level_ot_loss,
            revision=revision,
            matching=matching,
            skip_student_eos=skip_student_eos,
            skip_teacher_eos=skip_teacher_eos,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Teacher,
        student_labels: Tensor | Rows | None = None,
        teacher_labels: Tensor | Rows | None = None,
        *,
        num_items_in_batch: Tensor | float | None = None,
        token_weight: Tensor | None = None,
        return_components: bool = False,
    ) -> Any:
        if token_weight is not None:
            raise ValueError("token_weight: the published loss has no weights; use MultiLevelOTLoss.paper()")
        return self.function(
            student_logits,
            teacher_logits,
            student_labels,
            teacher_labels,
            **self.options,
            num_items_in_batch=num_items_in_batch,
            return_components=return_components,
        )
