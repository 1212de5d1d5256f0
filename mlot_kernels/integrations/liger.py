"""Row losses inside Liger's fused linear distillation (``liger_kernel.chunked_loss``, read at 0.8.5).

Liger makes the logits of two heads a chunk of rows at a time and takes their gradient at once, so that no logits are
there whole; here the loss of a chunk's logits is ours::

    loss = FusedLinearDistillationLoss("uld", weight_hard_loss=0.0, weight_soft_loss=1.0)
    loss(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight, labels).backward()
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlot_kernels import checks
from mlot_kernels.logits import Logits
from mlot_kernels.losses import DivergenceLoss, RankingLoss, ULDLoss, ranking_loss
from mlot_kernels.losses.common import check_backend
from mlot_kernels.ops.row_divergence import row_divergence
from mlot_kernels.ops.row_divergence.reference import KINDS
from mlot_kernels.ops.sorted_l1 import sorted_l1
from mlot_kernels.rows import Rows

try:
    from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase
except ImportError as error:
    raise ImportError("this integration needs Liger: pip install 'mlot-kernels[liger]'") from error

ChunkLoss = Callable[[Tensor, Tensor, Rows], Tensor]

LOSSES = ("uld", "ranking", *KINDS)
_RANKING = (
    "k",
    "space",
    "dedup",
    "epsilon",
    "ranking_weight",
    "base",
    "base_weight",
    "dynamic",
    "beta",
    "skew",
    "head",
)
_OPTIONS = {
    "uld": ("ties", "top_k", "tail"),
    "ranking": _RANKING,
    "forward_kl": ("floor", "column_pairs", "interpolation"),
    "reverse_kl": ("floor", "column_pairs"),
    "jsd": ("floor", "column_pairs", "beta"),
    "total_variation": ("floor", "column_pairs"),
    "skew_kl": ("floor", "column_pairs", "skew"),
    "skew_reverse_kl": ("floor", "column_pairs", "skew"),
    "adaptive_kl": ("column_pairs", "head"),
}


class FusedLinearDistillationFunction(LigerFusedLinearDistillationBase):
    """Liger's function, whose loss of a chunk is ``chunk_loss(student_logits, teacher_logits, rows)``, a sum."""

    @staticmethod
    def distillation_loss_fn(
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        ignore_index: int,
        chunk_loss: ChunkLoss,
        beta: float | None = None,  # Liger's own, which it hands to every loss; ours lies in chunk_loss
    ) -> Tensor:
        """The sum over a chunk's rows ``[N, V]`` that ``target`` ``[N]`` does not ignore."""
        rows = Rows.from_mask((target != ignore_index)[None], spans="one")
        return chunk_loss(student_logits, teacher_logits, rows)

    @classmethod
    def forward(
        cls,
        ctx: Any,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        chunk_loss: ChunkLoss,
        weight_hard_loss: float,
        weight_soft_loss: float,
        ignore_index: int,
        temperature: float,
        compiled: bool,
        chunk_size: int,
        return_soft_hard_loss: bool,
    ) -> Any:
        made = super().forward(
            cls=cls,
            ctx=ctx,
            student_input=student_input,
            student_weight=student_weight,
            teacher_input=teacher_input,
            teacher_weight=teacher_weight,
            target=true_labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            chunk_size=chunk_size,
            ignore_index=ignore_index,
            weight_hard_loss=weight_hard_loss,
            weight_soft_loss=weight_soft_loss,
            temperature=temperature,
            compiled=compiled,
            return_soft_hard_loss=return_soft_hard_loss,
            chunk_loss=chunk_loss,
        )
        if return_soft_hard_loss:  # Liger's backward knows the gradient of their sum alone
            ctx.mark_non_differentiable(*made[1:])
        return made

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        return *LigerFusedLinearDistillationBase.backward(ctx, grad_output, *args)[:6], *(None,) * 9


class FusedLinearDistillationLoss(nn.Module):
    """``weight_hard_loss`` cross-entropy + ``weight_soft_loss`` distillation loss of two heads, a chunk at a time.

    Called as ``LigerFusedLinearJSDLoss`` is. Both losses are means over the labels that are not ignored, with ULD too,
    and are 0 where there is none; what is given as ``num_items_in_batch`` elsewhere has no place here.

    Args:
        loss: ``"uld"``, for any two vocabularies, ``"ranking"``, or a ``kind`` of ``row_divergence``. Liger's own
            ``LigerFusedLinearJSDLoss(beta=b)`` is ``"jsd"`` with that ``beta``.
        weight_hard_loss: of the cross-entropy of the student's logits, at temperature 1; with 0 it is not made.
        weight_soft_loss: of the distillation loss.
        ignore_index: the label of rows that do not count.
        temperature: above 0; what both sides' logits are divided by. There is no factor T squared.
        compiled: hand each chunk's step to torch.compile, which costs a compilation for each new chunk size. Liger has
            True; our operators stand in the compiled step as they are, so that it has little to fuse.
        chunk_size: Liger makes ``rows // chunk_size`` chunks, at least one, of one size; so one may be larger.
        return_soft_hard_loss: also return the two losses before their weights, without a gradient.
        student_vocab_size, teacher_vocab_size: columns from here on are padding and take no part in the distillation
            loss; None: all count. Cross-entropy runs over all.
        backend: run our operators on this backend or raise.
        options: of ``sorted_l1``: ``ties``, ``top_k``, ``tail``; of ``ranking_loss``: all but ``shift``, ``reduction``
            and the vocabulary's; of ``row_divergence``: those that this kind has.

    Raises:
        TypeError, ValueError: an argument has another type or value, or ``loss`` has no such option.
    """

    def __init__(
        self,
        loss: str = "jsd",
        *,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = False,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss = checks.choice("loss", loss, LOSSES)
        unknown = options.keys() - set(_OPTIONS[loss])
        if unknown:
            raise TypeError(
                f"loss={loss!r} has the options {', '.join(_OPTIONS[loss])}, got {', '.join(sorted(unknown))}; leave "
                "them out"
            )
        if loss == "uld":
            ULDLoss(**options)  # which checks them
        elif loss == "ranking":
            RankingLoss(**options)
        else:
            DivergenceLoss(loss, **{name: value for name, value in options.items() if name != "floor"})
        check_backend(backend)
        self.weight_hard_loss = checks.number("weight_hard_loss", weight_hard_loss)
        self.weight_soft_loss = checks.number("weight_soft_loss", weight_soft_loss)
        self.ignore_index = ignore_index
        self.temperature = checks.number("temperature", temperature, above=0)
        self.compiled = checks.boolean("compiled", compiled)
        self.chunk_size = checks.integer("chunk_size", chunk_size, 1)
        self.return_soft_hard_loss = checks.boolean("return_soft_hard_loss", return_soft_hard_loss)
        self.student_vocab_size, self.teacher_vocab_size = student_vocab_size, teacher_vocab_size
        self.options = {**options, "backend": backend}

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Any:
        """The loss, a float32 scalar, or ``(loss, soft loss, hard loss)``.

        Args:
            student_input: ``[N, H_s]``, teacher_input: ``[N, H_t]``; row i of one side meets row i of the other. Two
                tokenizers' rows must be paired before, see ``mlot_kernels.pair``.
            student_weight: ``[V_s, H_s]``, teacher_weight: ``[V_t, H_t]``, constant as the teacher's rows are.
            true_labels: int64 ``[N]``, what each row predicts, in the student's vocabulary: shifted already.
            student_bias: ``[V_s]``, teacher_bias: ``[V_t]``.

        Returns:
            Differentiable with respect to ``student_input``, ``student_weight`` and ``student_bias``, whose gradients
            are made here and not in backward.
        """
        for name, value, shape in (
            ("student_input", student_input, "[N, H]"),
            ("student_weight", student_weight, "[V, H]"),
            ("teacher_input", teacher_input, "[N, H]"),
            ("teacher_weight", teacher_weight, "[V, H]"),
        ):
            checks.tensor(name, value, shape)
        checks.tensor("true_labels", true_labels, "[N]", (torch.int64,))
        for name, size in (("teacher_input", len(teacher_input)), ("true_labels", len(true_labels))):
            if size != len(student_input):  # Liger's chunks would be of other rows
                raise ValueError(
                    f"{name} must have a row for each of student_input, {len(student_input)}, got {size}; pair "
                    "the rows of two tokenizers first, see mlot_kernels.pair"
                )
        sizes = self._vocabularies(student_weight.shape[0], teacher_weight.shape[0])
        return FusedLinearDistillationFunction.apply(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias,
            teacher_bias,
            partial(_chunk_loss, self.loss, self.options, *sizes),
            self.weight_hard_loss,
            self.weight_soft_loss,
            self.ignore_index,
            self.temperature,
            self.compiled,
            self.chunk_size,
            self.return_soft_hard_loss,
        )

    def _vocabularies(self, student: int, teacher: int) -> tuple[int, int]:
        """Where each side's columns end, of heads with so many rows.

        Liger hands a student with fewer columns than the teacher more of them, with logits of 0: probability that it
        does not have. They must be left out of the softmax again.
        """
        sizes = [
            width if size is None else checks.integer(name, size, 1, width, "the rows of its head")
            for name, size, width in (
                ("student_vocab_size", self.student_vocab_size, student),
                ("teacher_vocab_size", self.teacher_vocab_size, teacher),
            )
        ]
        if self.loss != "uld" and self.options.get("column_pairs") is None and sizes[0] != sizes[1]:
            least = min(sizes)
            raise ValueError(
                f"loss={self.loss!r} needs vocabularies of one size, got {sizes[0]} and {sizes[1]}; where they are the "
                f"same but for padding, pass student_vocab_size and teacher_vocab_size ({least} or fewer); else take "
                "loss='uld'"
            )
        return sizes[0], sizes[1]

    def extra_repr(self) -> str:
        shown = {"weight_hard_loss": self.weight_hard_loss, "weight_soft_loss": self.weight_soft_loss}
        shown |= {"temperature": self.temperature, "chunk_size": self.chunk_size, **self.options}
        return ", ".join((repr(self.loss), *(f"{name}={value!r}" for name, value in shown.items())))


def _chunk_loss(
    loss: str,
    options: dict[str, Any],
    student_size: int,
    teacher_size: int,
    student_logits: Tensor,
    teacher_logits: Tensor,
    rows: Rows,
) -> Tensor:
    if loss == "ranking":
        total: Tensor = ranking_loss(
            student_logits[None],
            teacher_logits[None],
            rows,
            rows,
            student_vocab_size=student_size,
            teacher_vocab_size=teacher_size,
            reduction="sum",
            **options,
        )
        return total
    student = Logits(student_logits, rows, vocab_size=student_size)
    teacher = Logits(teacher_logits, rows, vocab_size=teacher_size)
    if loss == "uld":
        return sorted_l1(student, teacher, **options).sum()
    return row_divergence(student, teacher, kind=loss, **options).sum()
