"""A drop-in for the loss class of the published Multi-Level-OT code.

In its ``train`` script, replace the import of ``DistillationLoss`` by::

    from mlot_kernels.integrations.multi_level_ot import DistillationLoss
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from mlot_kernels import checks
from mlot_kernels.losses.official_multi_level_ot import OfficialMultiLevelOTLoss

_WITHOUT_EFFECT = {
    "batch_limit": 100,
    "store_path": "teacher_logits_partial.npy",
    "debug": False,
    "debug_rank": 0,
    "tokenizer_student": None,
    "tokenizer_teacher": None,
}
_MATCHINGS = {1: "sum", 2: "greedy"}


class DistillationLoss(nn.Module):
    """The published class: its constructor, its ``forward`` and its 3-tuple, on fused operators.

    Values are those of ``MultiLevelOTLoss.official()``, which see, but for ``f=2``. Unlike the published class it
    leaves the models' logits as they are, and an empty answer gives no NaN.

    Args:
        batch_limit, store_path, debug, debug_rank, tokenizer_student, tokenizer_teacher: taken and without effect;
            warns, by name, where one is not at its default.
        crossentropy_weight: of ``student_predictions.loss``.
        distillation_weight: of the distillation term.
        student_temperature, teacher_temperature, skip_student_eos, skip_teacher_eos, ignore_index: see
            ``official_multi_level_ot_loss``.
        f: 1, each side in the order of its own sums. 2, the greedy matching as it was meant: the published one, whose
            loops go over the wrong axes, raises or leaves columns out (``matching`` of
            ``official_multi_level_ot_loss``).
    """

    def __init__(
        self,
        batch_limit: int = 100,
        store_path: str = "teacher_logits_partial.npy",
        crossentropy_weight: float = 1,
        distillation_weight: float = 1,
        student_temperature: float = 1,
        teacher_temperature: float = 1,
        skip_student_eos: bool = False,
        skip_teacher_eos: bool = False,
        ignore_index: int = -100,
        debug: bool = False,
        debug_rank: int = 0,
        tokenizer_student: Any = None,
        tokenizer_teacher: Any = None,
        f: int = 1,
    ) -> None:
        super().__init__()
        given = {
            "batch_limit": batch_limit,
            "store_path": store_path,
            "debug": debug,
            "debug_rank": debug_rank,
            "tokenizer_student": tokenizer_student,
            "tokenizer_teacher": tokenizer_teacher,
        }
        idle = [name for name, value in given.items() if value != _WITHOUT_EFFECT[name]]
        if idle:
            warnings.warn(f"DistillationLoss: {', '.join(idle)} have no effect here; leave them out", stacklevel=2)
        if f not in _MATCHINGS:
            raise ValueError(f"f must be 1 (each side ranked by its own sums) or 2 (greedy matching), got {f!r}")
        self.crossentropy_weight = checks.number("crossentropy_weight", crossentropy_weight)
        self.distillation_weight = checks.number("distillation_weight", distillation_weight)
        self.distillation = OfficialMultiLevelOTLoss(
            matching=_MATCHINGS[f],
            skip_student_eos=skip_student_eos,
            skip_teacher_eos=skip_teacher_eos,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            ignore_index=ignore_index,
        )

    def forward(
        self,
        epoch: int,
        student_predictions: Any,
        teacher_predictions: Any,
        student_targets: Tensor,
        teacher_targets: Tensor,
        rank: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(crossentropy + distillation, crossentropy, distillation)``, each with its weight.

        Args:
            epoch, rank: taken and without effect, as in the published class.
            student_predictions: has ``.logits`` ``[B, T, V]`` and ``.loss``, the cross-entropy.
            teacher_predictions: has ``.logits``.
            student_targets, teacher_targets: labels ``[B, T]``.
        """
        if student_predictions.loss is None:
            raise ValueError("student_predictions.loss is None; call the student with labels, so that it has a loss")
        crossentropy = self.crossentropy_weight * student_predictions.loss
        distillation = self.distillation_weight * self.distillation(
            student_predictions.logits, teacher_predictions.logits, student_targets, teacher_targets
        )
        return crossentropy + distillation, crossentropy, distillation

    def on_epoch_end(self) -> None:
        """Does nothing: the published class stores nothing here either, unless its code is changed."""
