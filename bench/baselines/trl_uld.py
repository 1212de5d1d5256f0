"""TRL's own class ``ULDLoss`` (trl.experimental.gold, 1.16), driven as Universal Logit Distillation by position.

With ``use_extended_uld=False`` it pairs row i of one answer with row i of the other and merges no tokens. The rest of
its configuration is chosen so that nothing but the distillation term is left: no cross-entropy (its default), weight 1
(its default), temperatures 1 (its default), no hybrid loss (its default), and the last token of an answer counts (by
default TRL leaves it out on both sides).
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from bench.baselines.rows import wide

MERGE_STRATEGIES = {0: "observed", 1: "bayesian"}  # by how far the labels lie behind the rows that predict them


def trl_uld_loss(
    student_logits: Tensor, teacher_logits: Tensor, student_labels: Tensor, teacher_labels: Tensor, *, shift: int = 1
) -> Tensor:
    """``uld_loss(..., shift=shift)`` as TRL computes it, where every sequence has one answer of at least one token.

    Where a sequence has none on a side both count 0 for it, but TRL's mean counts that sequence too. TRL takes a row's
    softmax, sort and sum in the dtype of the logits; its trainer hands it float32, and so does this function.

    Args:
        student_logits: ``[B, T_s, V_s]``.
        teacher_logits: ``[B, T_t, V_t]``.
        student_labels, teacher_labels: ``[B, T_s]`` and ``[B, T_t]``; -100 is ignored, the others form one span.
        shift: 1: labels as a model takes them, TRL's strategy ``"bayesian"``; the first token of a sequence, which no
            row predicts, must be -100. 0: labels at the rows that count, TRL's default ``"observed"``, which reads rows
            of unshifted labels one too late.

    Returns:
        The mean over samples of the mean over the shorter answer's rows, a scalar.
    """
    if shift not in MERGE_STRATEGIES:
        raise ValueError(f"shift must be 0 or 1, got {shift!r}")
    # Positional ULD looks at the number of input ids only, so that the labels serve as well.
    loss = _uld_loss(MERGE_STRATEGIES[shift])
    return loss(
        wide(student_logits),
        wide(teacher_logits),
        student_labels,
        teacher_labels,
        student_input_ids=student_labels,
        teacher_input_ids=teacher_labels,
    )


@cache
def _uld_loss(merge_strategy: str) -> Any:
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
    except ImportError as error:
        raise ImportError("this baseline needs TRL 1.16: pip install trl==1.16.0") from error
    # The fields that the class reads; a GOLDConfig has these and a whole trainer's beside them.
    return ULDLoss(
        SimpleNamespace(
            use_extended_uld=False,
            uld_token_merge_strategy=merge_strategy,
            uld_crossentropy_weight=0.0,
            uld_distillation_weight=1.0,
            uld_student_temperature=1.0,
            uld_teacher_temperature=1.0,
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
            uld_use_hybrid_loss=False,
        )
    )
