"""Losses for arcee-ai's DistillKit (``distillkit.lossfuncs``, docs/recipes/README.md says what was read).

Two ways in::

    patch_distillkit()                                  # "kl", "jsd" and "tvd" in configurations are fused from now on
    trainer.loss_functions[0] = FusedRankingLoss(k=10)  # a DistillationTrainer that exists; its weight stays
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.losses import DivergenceLoss, RankingLoss
from mlot_kernels.losses.common import Loss
from mlot_kernels.teachers import Teacher, TeacherTopK, log_rest

try:
    from distillkit.lossfuncs import ALL_LOSS_CLASSES, LossFunctionBase, MissingProbabilityHandling
    from distillkit.signals import DenseSignal
except ImportError as error:
    raise ImportError("this integration needs DistillKit, from github.com/arcee-ai/DistillKit") from error

ZERO = MissingProbabilityHandling.ZERO


class _FusedLoss(LossFunctionBase):
    """What DistillKit calls, for a loss of ours whose mean is over tokens."""

    loss: Loss
    missing: MissingProbabilityHandling
    factor = 1.0

    def __call__(
        self,
        student_outputs: Any,
        signal: Any,
        mask: Tensor | None = None,
        hidden_state_mapping: Any = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            student_outputs: has ``logits`` ``[B, S, V]``.
            signal: a ``DenseSignal`` of logits ``[B, S, V]``, or a ``SparseSignal`` of K of them, whose values are
                log-probabilities or logits.
            mask: bool ``[B, S, 1]`` or ``[B, S]``, which rows count; None: all. DistillKit makes it of labels at the
                same positions: nothing is shifted.
            hidden_state_mapping: not for these losses, which read no hidden state.
            num_items_in_batch: replaces the mean's denominator, the number of rows that count.

        Raises:
            ValueError: the signal does not say what this loss needs.
        """
        logits = student_outputs.logits
        if mask is not None:
            mask = (mask.squeeze(-1) if mask.dim() == 3 else mask).bool()
        teacher, temperatures = self._teacher(signal)
        made: Tensor = self.loss.function(
            logits, teacher, mask, mask, **{**self.loss.options, **temperatures}, num_items_in_batch=num_items_in_batch
        )
        return made * self.factor

    def _teacher(self, signal: Any) -> tuple[Teacher, dict[str, float]]:
        """What the signal is to the loss, and the temperatures at which they are compared."""
        raise NotImplementedError

    def _top_k(self, log_probabilities: Tensor, signal: Any, tail: str) -> TeacherTopK:
        return TeacherTopK(log_probabilities, signal.sparse_ids, "renormalize" if self.missing == ZERO else tail)

    def _values(self, signal: Any) -> Tensor:
        """Log-probabilities ``[B, S, K]`` at the temperature that they were made at."""
        values: Tensor = signal.sparse_values.detach()
        if signal.log_values:
            return values
        if self.missing != ZERO:
            raise ValueError(
                "missing_probability_handling must be 'zero' for a SparseSignal with log_values=False, whose logits do "
                f"not say what is missing, got {self.missing.value!r}"
            )
        return values.log_softmax(-1)


def _missing(value: Any) -> MissingProbabilityHandling:
    names = tuple(member.value for member in MissingProbabilityHandling)
    name = checks.choice("missing_probability_handling", getattr(value, "value", value), names)
    return MissingProbabilityHandling(name)


def _at_temperature_1(signal: Any, loss: str) -> None:
    if not math.isclose(signal.generation_temperature, 1):
        raise ValueError(f"{loss} needs a signal made at temperature 1, got {signal.generation_temperature}")


class FusedDivergenceLoss(_FusedLoss):
    """A divergence times the temperature squared, the mean over tokens that count.

    With ``"forward_kl"``, ``"jsd"`` and ``"total_variation"`` it is DistillKit's ``KLDLoss``, ``JSDLoss`` and
    ``TVDLoss``, but for their cut-offs at 1e-6 and 1e-8; it is float32 where theirs has the student's dtype, and 0
    where no token counts.

    Args:
        temperature: above 0; of both sides. What a ``SparseSignal`` was made at is taken into account.
        missing_probability_handling: what of a ``SparseSignal`` becomes of the probability that the K leave over, as
            DistillKit has it. ``"zero"``: nothing, the K are divided by their sum. ``"symmetric_uniform"``: it is
            compared as a whole with what the student has left over.
        sparse_chunk_length: None, for nothing of the size of the logits is made here.
        kind: see ``row_divergence``; ``"reverse_kl"`` and ``"adaptive_kl"`` of a ``SparseSignal`` need
            ``"symmetric_uniform"``, else they are infinite.
        options: of ``DivergenceLoss``, but for temperatures, ``shift`` and ``reduction``.

    Raises:
        TypeError, ValueError: an argument has another type or value.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        missing_probability_handling: Any = ZERO,
        sparse_chunk_length: int | None = None,
        *,
        kind: str = "forward_kl",
        **options: Any,
    ) -> None:
        if sparse_chunk_length is not None:
            raise ValueError(
                f"sparse_chunk_length must be None, got {sparse_chunk_length}: no chunk is made here; leave it out"
            )
        _only(options, "student_temperature", "teacher_temperature", "shift", "reduction")
        self.temperature = checks.number("temperature", temperature, above=0)
        self.factor = self.temperature**2
        self.missing = _missing(missing_probability_handling)
        self.loss = DivergenceLoss(kind, **options)

    @classmethod
    def name(cls) -> str:
        return "mlot_divergence"

    def _teacher(self, signal: Any) -> tuple[Teacher, dict[str, float]]:
        both = {"student_temperature": self.temperature, "teacher_temperature": self.temperature}
        if isinstance(signal, DenseSignal):
            _at_temperature_1(signal, "a divergence of a DenseSignal")
            return signal.logits.detach(), both
        exponent = signal.generation_temperature / self.temperature
        log_p = self._values(signal)
        if self.missing == ZERO:
            return self._top_k(log_p, signal, "bucket"), {**both, "teacher_temperature": 1 / exponent}
        if not math.isclose(exponent, 1):  # of the K and of what they leave over, as one outcome more
            log_p = torch.cat((log_p, log_rest(log_p)), -1).mul(exponent).log_softmax(-1)[..., :-1]
        return self._top_k(log_p, signal, "bucket"), {**both, "teacher_temperature": 1.0}


class FusedKLDLoss(FusedDivergenceLoss):
    """DistillKit's ``KLDLoss`` on fused operators: its name, constructor and values."""

    def __init__(
        self, temperature: float, missing_probability_handling: Any = ZERO, sparse_chunk_length: int | None = None
    ) -> None:
        super().__init__(temperature, missing_probability_handling, sparse_chunk_length, kind="forward_kl")

    @classmethod
    def name(cls) -> str:
        return "kl"


class FusedJSDLoss(FusedDivergenceLoss):
    """DistillKit's ``JSDLoss`` on fused operators: its name, constructor and values."""

    def __init__(
        self, temperature: float, missing_probability_handling: Any = ZERO, sparse_chunk_length: int | None = None
    ) -> None:
        super().__init__(temperature, missing_probability_handling, sparse_chunk_length, kind="jsd")

    @classmethod
    def name(cls) -> str:
        return "jsd"


class FusedTVDLoss(FusedDivergenceLoss):
    """DistillKit's ``TVDLoss`` on fused operators: its name, constructor and values."""

    def __init__(
        self, temperature: float, missing_probability_handling: Any = ZERO, sparse_chunk_length: int | None = None
    ) -> None:
        super().__init__(temperature, missing_probability_handling, sparse_chunk_length, kind="total_variation")

    @classmethod
    def name(cls) -> str:
        return "tvd"


class FusedRankingLoss(_FusedLoss):
    """``RankingLoss``, which no class of DistillKit is, over its signals.

    Args:
        missing_probability_handling: of a ``SparseSignal``: ``"zero"``, or ``"symmetric_uniform"``: each column that is
            not among the K has the same part of what they leave over. ``k`` is at most K.
        options: of ``RankingLoss``, but for ``shift`` and ``reduction``.

    Raises:
        TypeError, ValueError: an argument has another type or value.
    """

    def __init__(self, missing_probability_handling: Any = ZERO, **options: Any) -> None:
        _only(options, "shift", "reduction")
        self.missing = _missing(missing_probability_handling)
        self.loss = RankingLoss(**options)

    @classmethod
    def name(cls) -> str:
        return "mlot_ranking"

    def _teacher(self, signal: Any) -> tuple[Teacher, dict[str, float]]:
        _at_temperature_1(signal, "RankingLoss")
        if isinstance(signal, DenseSignal):
            return signal.logits.detach(), {}
        return self._top_k(self._values(signal), signal, "uniform"), {}


def _only(options: dict[str, Any], *without: str) -> None:
    for name in without:
        if name in options:
            raise TypeError(f"{name} is DistillKit's to say here, got {options[name]!r}; leave it out")


_FUSED = (FusedKLDLoss, FusedJSDLoss, FusedTVDLoss)
_STOCK = {cls.name(): cls for cls in ALL_LOSS_CLASSES}


def patch_distillkit() -> None:
    """Let every trainer that is made from here on have fused losses for ``"kl"``, ``"jsd"`` and ``"tvd"``.

    ``unpatch_distillkit`` takes it back.
    """
    _replace({cls.name(): cls for cls in _FUSED})


def unpatch_distillkit() -> None:
    """Let new trainers have DistillKit's own losses again."""
    _replace({cls.name(): _STOCK[cls.name()] for cls in _FUSED if cls.name() in _STOCK})


def _replace(by_name: dict[str, type]) -> None:
    for i, cls in enumerate(ALL_LOSS_CLASSES):  # the list itself, which the trainer's module holds
        ALL_LOSS_CLASSES[i] = by_name.get(cls.name(), cls)
