"""Teachers that come without their logits: as a top-k of log-probabilities, or as hidden states and a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.checks import accumulator
from mlot_kernels.rows import gather_rows

TAILS = ("renormalize", "uniform", "bucket")


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The largest log-probabilities of each of a teacher's rows, as a server or a cache gives them.

    Attributes:
        log_probabilities: ``[B, T, K]``, float16, bfloat16, float32 or float64, in any order, normalised over the whole
            vocabulary: a row's probabilities sum to 1 or less. ``-inf`` where a row has fewer than K. Constants: no
            gradient goes there.
        columns: int64 ``[B, T, K]``, the tokens' numbers, none twice in a row; anything where the log-probability is
            ``-inf``. None: not known, which is enough for ``ULDLoss`` alone.
        tail: what becomes of the probability that the K leave over. ``"renormalize"``: nothing, the K are divided by
            their sum. ``"uniform"``: every other column gets the same part of it. ``"bucket"``: it is compared as a
            whole with what the student has left over; at temperature 1 only. A part of it below one rounding of 1
            counts as that rounding.
    """

    log_probabilities: Tensor
    columns: Tensor | None = None
    tail: str = "renormalize"

    def __post_init__(self) -> None:
        name = "TeacherTopK.log_probabilities"
        values = checks.tensor(name, self.log_probabilities, "[B, T, K]")
        if values.shape[2] == 0:
            raise ValueError(f"{name} must have at least one column, got shape {tuple(values.shape)}")
        _constant(name, values)
        checks.choice("TeacherTopK.tail", self.tail, TAILS)
        if self.columns is not None:
            checks.tensor("TeacherTopK.columns", self.columns, "[B, T, K]", (torch.int64,))
            checks.sized("TeacherTopK.columns", self.columns, values.shape, "[B, T, K] as its log_probabilities")
            checks.same_device(**{name: values, "TeacherTopK.columns": self.columns})

    @property
    def by_position(self) -> Tensor:
        """What has ``[B, T]`` as its first dimensions."""
        return self.log_probabilities

    def at(self, position: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """The rows at ``position`` ``[B, n]``: log-probabilities in the accumulator's dtype, and their columns.

        ``[B, n, K]`` both. What is -inf has the column ``vocab_size``. A column that does not exist has it, too, and
        the log-probability NaN.
        """
        log_p = gather_rows(self.log_probabilities, position)
        log_p = log_p.to(accumulator(log_p.dtype))
        if self.columns is None:
            columns = torch.arange(log_p.shape[2], device=log_p.device).expand_as(log_p)
        else:
            columns = gather_rows(self.columns, position)
        unknown = log_p == float("-inf")
        outside = ((columns < 0) | (columns >= vocab_size)) & ~unknown
        return log_p.masked_fill(outside, float("nan")), columns.masked_fill(unknown | outside, vocab_size)

    def log_tail(self) -> Tensor:
        """The log of what the K leave over, ``[B, T, 1]``, in the accumulator's dtype."""
        return log_rest(self.log_probabilities.to(accumulator(self.log_probabilities.dtype)))


@dataclass(frozen=True, eq=False)
class TeacherHidden:
    """A teacher's last hidden states and its head, for logits that are made a block of rows at a time.

    ``logits = hidden @ weight.T + bias``, times ``logit_scale``, and then ``softcap * tanh(logits / softcap)``.
    Backward makes them a second time. On a GPU they are made for every position of the student's, whether it counts or
    not, because nothing waits for the device: leave positions out that no row needs. torch.compile runs this outside
    its graph.

    Attributes:
        hidden: ``[B, T, D]``, float16, bfloat16, float32 or float64. Constants: no gradient goes there, nor to the
            head.
        weight: ``[V, D]``, of the dtype of ``hidden``.
        bias: ``[V]``, of the same, or None.
        logit_scale: what the logits are multiplied by.
        softcap: above 0; None: no cap.
        block_rows: how many rows of logits exist at once. A head's matrix is read once a block.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    block_rows: int = 512

    def __post_init__(self) -> None:
        checks.tensor("TeacherHidden.hidden", self.hidden, "[B, T, D]")
        _constant("TeacherHidden.hidden", self.hidden)
        dtype = (self.hidden.dtype,)
        checks.tensor("TeacherHidden.weight", self.weight, "[V, D]", dtype)
        width = self.weight.shape[0], self.hidden.shape[2]
        checks.sized("TeacherHidden.weight", self.weight, width, "[V, D], D as hidden's")
        if self.bias is not None:
            checks.tensor("TeacherHidden.bias", self.bias, "[V]", dtype)
            checks.sized("TeacherHidden.bias", self.bias, self.weight.shape[:1], "[V] as weight")
        checks.same_device(
            **{
                "TeacherHidden.hidden": self.hidden,
                "TeacherHidden.weight": self.weight,
                "TeacherHidden.bias": self.bias,
            }
        )
        checks.number("TeacherHidden.logit_scale", self.logit_scale)
        if self.softcap is not None:
            checks.number("TeacherHidden.softcap", self.softcap, above=0)
        checks.integer("TeacherHidden.block_rows", self.block_rows, 1)

    @property
    def by_position(self) -> Tensor:
        """What has ``[B, T]`` as its first dimensions."""
        return self.hidden

    @property
    def width(self) -> int:
        """V."""
        return self.weight.shape[0]

    @torch.no_grad()
    def logits(self, position: Tensor) -> Tensor:
        """The rows at ``position`` ``[B, n]``: ``[B, n, V]``."""
        hidden = gather_rows(self.hidden, position)
        with torch.autocast(hidden.device.type, enabled=False):  # a second making has no autocast about it
            logits = F.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1:
            logits *= self.logit_scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True, eq=False)
class SpreadTopK:
    """A top-k as rows of its whole vocabulary, whose other columns share what it leaves over."""

    top_k: TeacherTopK
    vocab_size: int
    block_rows: int = 512

    @property
    def by_position(self) -> Tensor:
        return self.top_k.by_position

    @property
    def width(self) -> int:
        return self.vocab_size

    def logits(self, position: Tensor) -> Tensor:
        """The rows at ``position`` ``[B, n]``: ``[B, n, V + 1]``, log-probabilities; the last column means nothing."""
        log_p, columns = self.top_k.at(position, self.vocab_size)
        others = self.vocab_size - (columns < self.vocab_size).sum(-1, keepdim=True)
        share = (log_rest(log_p) - others.to(log_p.dtype).log()).masked_fill(others == 0, float("-inf"))
        return share.repeat(1, 1, self.vocab_size + 1).scatter_(2, columns, log_p)


RowSource = TeacherHidden | SpreadTopK
Teacher = Tensor | TeacherHidden | TeacherTopK


def by_position(teacher: Teacher) -> Tensor:
    """A tensor with the teacher's ``[B, T]`` as its first dimensions, on its device."""
    return teacher if isinstance(teacher, Tensor) else teacher.by_position


def check_temperature(teacher: TeacherTopK, temperature: float) -> None:
    if teacher.tail == "bucket" and temperature != 1:
        raise ValueError(
            "a TeacherTopK with tail='bucket' needs teacher_temperature=1, because nobody knows what its tail would be "
            f"at another, got {temperature:g}; take tail='renormalize' or 'uniform'"
        )


def need_columns(teacher: TeacherTopK, loss: str) -> None:
    if teacher.columns is None:
        raise ValueError(
            f"{loss} compares columns, and needs TeacherTopK.columns, got None; pass them, or take ULDLoss, which "
            "compares sorted probabilities"
        )


def log_rest(log_p: Tensor) -> Tensor:
    """``log (1 - sum p)`` of ``[..., K]`` log-probabilities, ``[..., 1]``; at least one rounding of 1."""
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    return torch.where(rest.isnan(), rest, rest.clamp(min=torch.finfo(rest.dtype).eps / 2)).log()


def _constant(name: str, value: Any) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} is a constant and gets no gradient, but requires one; pass .detach()")
