"""A batch as a trainer has it: both models' logits and their labels."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines.multi_level_ot import dense_paper_loss, published_loss
from bench.suite import nbytes
from mlot_kernels.cases import large_pair


def batch(
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    *,
    sequences: int,
    rows: int,
    student_vocabulary: int,
    teacher_vocabulary: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's and teacher's logits ``[sequences, rows + 1, vocabulary]``, and labels of all positions but the first:
    the first ``rows`` positions predict one each."""
    student, teacher = large_pair(
        dtype,
        device,
        seed,
        sequences=sequences,
        rows=rows + 1,
        student_vocabulary=student_vocabulary,
        teacher_vocabulary=teacher_vocabulary,
    )
    generator = torch.Generator().manual_seed(seed)
    labels = [
        torch.randint(vocabulary, (sequences, rows + 1), generator=generator)
        for vocabulary in (student_vocabulary, teacher_vocabulary)
    ]
    for side in labels:
        side[:, 0] = -100
    return student, teacher, labels[0].to(device), labels[1].to(device)


def dense(student: Tensor, teacher: Tensor, *labels: Tensor) -> Tensor:
    """The paper's loss by hand on the batch's rows, which all count."""
    return dense_paper_loss(student[:, :-1], teacher[:, :-1])


def published(student: Tensor, teacher: Tensor, *labels: Tensor) -> Tensor:
    """The published loss on logits in float32: eager torch has no 16-bit cdist."""
    return published_loss(student.float(), teacher.float(), *labels)


def traffic(student: Tensor, teacher: Tensor, *labels: Tensor) -> tuple[int, int]:
    """Both sides' logits are read once; then the student's are read again and their gradient written."""
    return nbytes(student, teacher), 2 * nbytes(student)
