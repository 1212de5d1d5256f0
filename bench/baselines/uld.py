"""Universal Logit Distillation in eager PyTorch: as its authors published it, and tidied for rows that all count."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines.multi_level_ot import answer_first, answer_span
from bench.baselines.rows import sorted_l1


def published_uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor,
    teacher_labels: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    skip_student_eos: bool = False,
    skip_teacher_eos: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """The distillation part of the published code: two full sorts of every row, padding rows included.

    Args:
        student_logits: ``[B, Ts, Vs]``.
        teacher_logits: ``[B, Tt, Vt]``.
        student_labels, teacher_labels: ``[B, Ts]`` and ``[B, Tt]``, unshifted; the answer is one contiguous span.

    Returns:
        The mean over samples of the mean over the shorter answer's rows, a scalar.
    """
    student_spans = [answer_span(row, skip_student_eos, ignore_index) for row in student_labels]
    teacher_spans = [answer_span(row, skip_teacher_eos, ignore_index) for row in teacher_labels]
    student, teacher = student_logits.clone(), teacher_logits.clone()  # the original writes into the model's logits
    for i in range(len(student)):
        student[i] = answer_first(student_logits[i], *student_spans[i], student_temperature)
        teacher[i] = answer_first(teacher_logits[i], *teacher_spans[i], teacher_temperature)
    student, teacher = (p.sort(dim=-1, descending=True).values for p in (student, teacher))
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in (student, teacher))
    losses = []
    for i in range(len(student)):
        size = min(student_spans[i][1], teacher_spans[i][1])
        losses.append((student[i, :size] - teacher[i, :size]).abs().sum(-1).mean())
    return torch.stack(losses).mean()


def dense_uld_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The loss where every row counts: batched, and one graph for ``torch.compile(fullgraph=True)``.

    Args:
        student_logits: ``[B, A_s, V_s]``; 16-bit ones are taken to float32.
        teacher_logits: ``[B, A_t, V_t]``; the first ``min(A_s, A_t)`` rows are paired.

    Returns:
        The mean over the paired rows of all sequences, a scalar.
    """
    paired = min(student_logits.shape[1], teacher_logits.shape[1])
    return sorted_l1(student_logits[:, :paired], teacher_logits[:, :paired])[0].mean()
