"""The losses of TRL's GOLD trainer (``trl.experimental.gold``, read at 1.16.0) on fused operators.

Three ways in, each one line::

    trainer.uld_loss_fn = GoldLoss.of(trainer)      # a GOLDTrainer that exists
    patch_gold()                                    # every one made from here on
    trainer = FusedGOLDTrainer(...)                 # a subclass, right under gradient accumulation, too
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlot_kernels import checks
from mlot_kernels.alignment import align_byte_offsets
from mlot_kernels.logits import Logits
from mlot_kernels.losses import HybridLoss, MultiLevelOTLoss, RankingLoss, ULDLoss
from mlot_kernels.merging import MergedRows, merge_groups
from mlot_kernels.one_gradient import token_log_probability_and_logits
from mlot_kernels.rows import Rows
from mlot_kernels.vocabularies import shared_tokens

try:
    from trl.experimental.gold import gold_trainer
except ImportError as error:
    raise ImportError("this integration needs TRL: pip install 'mlot-kernels[trl]'") from error

LOSSES = (HybridLoss, ULDLoss, MultiLevelOTLoss, RankingLoss)
IGNORED = -100


class GoldLoss(nn.Module):
    """TRL's ``ULDLoss``: its constructor, its arguments and its values, without a loop over samples or tokens.

    Every field of ``GOLDConfig`` that TRL's class reads counts. Where it computes in the dtype of the logits, sums are
    float32 here, and where a sequence has no token its loss is 0 in a mean over all sequences, as there. Equal logits
    of a row, which are many in bfloat16, share the mean of their gradients, where TRL's sort gives each one its own.

    Args:
        config: a ``GOLDConfig``.
        student_tokenizer, teacher_tokenizer: for ``uld_use_hybrid_loss`` and ``RankingLoss``, which compare columns.
        device: where the table of shared tokens lies; None: it follows the logits.
        loss: another loss than the one that ``config`` names: ``HybridLoss``, ``ULDLoss``, ``MultiLevelOTLoss`` or, for
            one vocabulary and ``use_extended_uld=False``, ``RankingLoss``; with ``reduction="mean"``. Its temperatures
            are its own, and those of ``config`` must be 1.

    Attributes:
        use_extended_uld: as the trainer reads it.
        last_matched_loss, last_unmatched_loss: the hybrid loss's parts of the last batch, for the trainer's log, where
            TRL has those of the batch's last sample. There with a hybrid loss only.

    Raises:
        TypeError, ValueError: ``config`` and ``loss`` do not go together.
    """

    def __init__(
        self,
        config: Any,
        student_tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        device: torch.device | str | None = None,
        *,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.crossentropy_weight = config.uld_crossentropy_weight
        self.distillation_weight = config.uld_distillation_weight
        self.skip_student_eos = config.uld_skip_student_eos
        self.skip_teacher_eos = config.uld_skip_teacher_eos
        self.use_extended_uld = config.use_extended_uld
        self.strategy = checks.choice(
            "uld_token_merge_strategy", config.uld_token_merge_strategy, ("observed", "bayesian")
        )
        if loss is None:
            self.loss = _loss_of(config, student_tokenizer, teacher_tokenizer, device)
        else:
            _check_loss(loss, config, student_tokenizer, teacher_tokenizer)
            self.loss = loss
        if isinstance(self.loss, HybridLoss):
            self.last_matched_loss: Tensor | None = None
            self.last_unmatched_loss: Tensor | None = None

    @classmethod
    def of(cls, trainer: Any, *, loss: nn.Module | None = None) -> GoldLoss:
        """The loss for a ``GOLDTrainer`` that exists: ``trainer.uld_loss_fn = GoldLoss.of(trainer)``."""
        return cls(trainer.args, trainer._tokenizer, trainer.teacher_tokenizer, trainer.accelerator.device, loss=loss)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_labels: Tensor,
        teacher_labels: Tensor,
        student_input_ids: Tensor,
        teacher_input_ids: Tensor,
        student_byte_offsets: Tensor | None = None,
        teacher_byte_offsets: Tensor | None = None,
    ) -> Tensor:
        """``uld_crossentropy_weight`` cross-entropy + ``uld_distillation_weight`` distillation loss, a scalar.

        Args:
            student_logits: ``[B, T_s, V_s]``, teacher_logits: ``[B, T_t, V_t]``.
            student_labels, teacher_labels: ``[B, T]``, as a model takes them; -100 but in one answer, which is as many
                tokens as are not -100, from the first of them on.
            student_input_ids, teacher_input_ids: ``[B, T]``.
            student_byte_offsets, teacher_byte_offsets: ``[B, T, 2]``, of the answer's tokens in its UTF-8 bytes; with
                ``use_extended_uld`` they must be there.
        """
        crossentropy: Tensor | float = 0.0
        if self.crossentropy_weight > 0:
            crossentropy, student_logits = _crossentropy(student_logits, student_labels)
        device = student_logits.device
        answers = [
            _answer(labels.to(device), skip)
            for labels, skip in (
                (student_labels, self.skip_student_eos),
                (teacher_labels, self.skip_teacher_eos),
            )
        ]
        rows: dict[str, Any]
        if self.use_extended_uld:
            offsets = _offsets(student_byte_offsets, teacher_byte_offsets)
            ids = student_input_ids.to(device), teacher_input_ids.to(device)
            rows = {"alignment": self._merged(answers, [x.to(device) for x in offsets], ids)}
        else:
            student_rows, teacher_rows = self._by_position(answers)
            rows = {"student_labels": student_rows, "teacher_labels": teacher_rows}
        return self.crossentropy_weight * crossentropy + self.distillation_weight * self._distillation(
            student_logits, teacher_logits, rows
        )

    def _distillation(self, student_logits: Tensor, teacher_logits: Tensor, rows: dict[str, Any]) -> Tensor:
        loss = self.loss
        if isinstance(loss, RankingLoss):  # its mean is over tokens
            value: Tensor = loss(student_logits, teacher_logits, **rows)
            return value
        rows["num_items_in_batch"] = float(max(1, len(student_logits)))
        if not isinstance(loss, HybridLoss):
            value = loss(student_logits, teacher_logits, **rows)
            return value
        _check_columns(loss.options["column_pairs"], student_logits, teacher_logits)
        value, components = loss(student_logits, teacher_logits, **rows, return_components=True)
        self.last_matched_loss, self.last_unmatched_loss = components["matched"], components["unmatched"]
        return value

    def _merged(
        self, answers: list[tuple[Tensor, Tensor, int]], offsets: list[Tensor], ids: tuple[Tensor, Tensor]
    ) -> MergedRows:
        masks = []
        for start, count, width in answers:
            position = torch.arange(width, device=start.device)
            masks.append((position >= start[:, None]) & (position < (start + count)[:, None]))
        alignment = align_byte_offsets(offsets[0], offsets[1], masks[0], masks[1])
        return merge_groups(alignment, *ids, strategy=self.strategy)

    def _by_position(self, answers: list[tuple[Tensor, Tensor, int]]) -> list[Rows]:
        shift = int(self.strategy == "bayesian")
        dropped = torch.zeros_like(answers[0][0])
        if shift:  # no row predicts the token at position 0: neither side's first token counts
            for start, count, _ in answers:
                dropped = dropped | ((start == 0) & (count > 0))
        return [
            Rows.from_lengths(start + dropped - shift, (count - dropped).clamp(min=0), width)
            for start, count, width in answers
        ]


def _loss_of(config: Any, student_tokenizer: Any, teacher_tokenizer: Any, device: Any) -> nn.Module:
    temperatures = {
        "student_temperature": config.uld_student_temperature,
        "teacher_temperature": config.uld_teacher_temperature,
    }
    if not config.uld_use_hybrid_loss:
        return ULDLoss(**temperatures)
    if student_tokenizer is None or teacher_tokenizer is None:
        raise ValueError("uld_use_hybrid_loss compares tokens that both tokenizers have; pass both tokenizers")
    return HybridLoss(
        shared_tokens(student_tokenizer, teacher_tokenizer, device=device),
        beta=config.beta,
        matched_weight=config.uld_hybrid_matched_weight,
        unmatched_weight=config.uld_hybrid_unmatched_weight,
        **temperatures,
    )


def _check_loss(loss: nn.Module, config: Any, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    if not isinstance(loss, LOSSES):
        names = ", ".join(known.__name__ for known in LOSSES)
        raise TypeError(f"loss must be one of {names}, got {type(loss).__name__}")
    if config.uld_use_hybrid_loss and not isinstance(loss, HybridLoss):
        raise ValueError(
            f"uld_use_hybrid_loss asks for HybridLoss, got loss={type(loss).__name__}; leave one of them out"
        )
    for name in ("uld_student_temperature", "uld_teacher_temperature"):
        if getattr(config, name) != 1:
            raise ValueError(
                f"{name} must be 1 where a loss is given, got {getattr(config, name)}; give it to the loss"
            )
    if loss.options["reduction"] != "mean":
        raise ValueError(f"loss must have reduction='mean', got {loss.options['reduction']!r}")
    if isinstance(loss, RankingLoss):
        if config.use_extended_uld:
            raise ValueError("RankingLoss pairs rows by their position; set use_extended_uld=False")
        if student_tokenizer is None or teacher_tokenizer is None:
            raise ValueError("RankingLoss compares columns of one vocabulary; pass both tokenizers")
        if student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
            raise ValueError(
                "RankingLoss compares columns of one vocabulary, and student_tokenizer and teacher_tokenizer have two; "
                "take ULDLoss, HybridLoss or MultiLevelOTLoss"
            )


def _check_columns(column_pairs: Tensor, *sides: Tensor) -> None:
    """Tokenizers may know tokens that the models' logits have no column for; a meta tensor or a GPU's is not asked."""
    if column_pairs.device.type != "cpu" or len(column_pairs) == 0:
        return
    for name, most, logits in zip(("student", "teacher"), column_pairs.amax(0).tolist(), sides, strict=True):
        if most >= logits.shape[2]:
            raise ValueError(
                f"the {name}'s tokenizer has the token {most}, and its logits {logits.shape[2]} columns; resize its "
                "embedding, or pass loss=HybridLoss(shared_tokens(..., student_vocab_size=..., teacher_vocab_size=...))"
            )


def _crossentropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over labels, 0 where there is none; and the logits to read from here on."""
    labels = labels.to(logits.device)
    rows = Rows.from_labels(labels)
    tokens = labels.gather(1, (rows.index + 1).clamp(max=labels.shape[1] - 1)) if labels.shape[1] else labels
    tokens = tokens.masked_fill(~rows.counted, 0)
    log_p, values = token_log_probability_and_logits(Logits(logits, rows), tokens, None)
    return -log_p.sum() / rows.count.sum().clamp(min=1), values


def _answer(labels: Tensor, skip_eos: bool) -> tuple[Tensor, Tensor, int]:
    """Where the answer starts ``[B]``, how many tokens of it count ``[B]``, and the sequences' width."""
    there = labels != IGNORED
    count = there.sum(1)
    start = there.to(torch.uint8).argmax(1) if labels.shape[1] else torch.zeros_like(count)
    return start, (count - int(skip_eos)).clamp(min=0), labels.shape[1]


def _offsets(student: Tensor | None, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    if student is None or teacher is None:
        raise ValueError(
            "student_byte_offsets and teacher_byte_offsets must be there with use_extended_uld=True; pass them, or set "
            "use_extended_uld=False"
        )
    return student, teacher


_STOCK = gold_trainer.ULDLoss


def patch_gold(*, loss: nn.Module | None = None) -> None:
    """Let every ``GOLDTrainer`` that is made from here on have ``GoldLoss``; ``unpatch_gold`` takes it back."""
    gold_trainer.ULDLoss = GoldLoss if loss is None else partial(GoldLoss, loss=loss)


def unpatch_gold() -> None:
    """Let new ``GOLDTrainer`` have TRL's own loss again."""
    gold_trainer.ULDLoss = _STOCK


class FusedGOLDTrainer(gold_trainer.GOLDTrainer):
    """TRL's ``GOLDTrainer`` with ``GoldLoss``.

    TRL 1.16 adds up the losses of a step's micro-batches with ``use_uld_loss``, so that loss and gradient grow with
    ``gradient_accumulation_steps``; here they are their mean, as without accumulation.

    Args:
        args, kwargs: of ``GOLDTrainer``.
        loss: as of ``GoldLoss``.
    """

    def __init__(self, *args: Any, loss: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.use_uld_loss:
            self.uld_loss_fn = GoldLoss.of(self, loss=loss)
        elif loss is not None:
            raise ValueError("a loss needs use_uld_loss=True in the GOLDConfig, which trains on the JSD without it")

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        made = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not (self.use_uld_loss and self.teacher_tokenizer is not None and self.model.training):
            return made
        steps = self.current_gradient_accumulation_steps
        return (made[0] / steps, made[1]) if return_outputs else made / steps
