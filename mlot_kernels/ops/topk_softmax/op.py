"""The k most probable columns of every row, with log-probabilities normalised over the whole row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits, prepare
from mlot_kernels.native import native
from mlot_kernels.ops.topk_softmax import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator

_INPUTS = "Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale"
_OPTIONS = "float temperature, bool standardize, SymInt vocab_size, SymInt k, str backend"
_SAVED = "Tensor peak, Tensor log_total, Tensor expected, Tensor mean, Tensor scale, Tensor slope"
_OUTPUTS = f"(Tensor log_probabilities, Tensor columns, Tensor lse, {_SAVED})"

_TRITON = "mlot_kernels.ops.topk_softmax.triton_kernels"

FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "topk_softmax_forward"),
    "triton": lazy(_TRITON, "forward"),
    "cuda": native("cuda", "topk_softmax_forward"),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "topk_softmax_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "topk_softmax_backward"),
}


class TopK(NamedTuple):
    """The k most probable columns of the counted rows.

    Attributes:
        log_probabilities: ``[B, A, k]``, float32 (float64 for float64 logits), descending; 0 beyond the counted rows.
        columns: ``[B, A, k]`` int64; 0 beyond the counted rows.
        lse: ``[B, A]``, ``logsumexp(values / (temperature * scale))``, the log of the row's normaliser, over all
            columns below ``vocab_size``, without the log scale; 0 beyond the counted rows.
    """

    log_probabilities: Tensor
    columns: Tensor
    lse: Tensor


def _forward_fake(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    temperature: float,
    standardize: bool,
    vocab_size: int,
    k: int,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = accumulator(values.dtype)
    per_row = (values.new_empty(index.shape, dtype=dtype) for _ in range(7))
    return values.new_empty((*index.shape, k), dtype=dtype), index.new_empty((*index.shape, k)), *per_row


def _backward_fake(grad_log_probabilities: Tensor, grad_lse: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), grad_lse.new_empty(grad_lse.shape)


_forward = raw_operator(
    f"topk_softmax_forward({_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}", fake=_forward_fake, implementations=FORWARD
)
_backward = raw_operator(
    "topk_softmax_backward(Tensor grad_log_probabilities, Tensor grad_lse, Tensor values, Tensor index, "
    f"Tensor? column_mask, Tensor columns, {_SAVED}, float temperature, SymInt vocab_size, str backend) -> "
    "(Tensor grad_values, Tensor grad_log_scale)",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class TopkSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        values: Tensor,
        index: Tensor,
        column_mask: Tensor | None,
        log_scale: Tensor | None,
        temperature: float,
        standardize: bool,
        vocab_size: int,
        k: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _forward(values, index, column_mask, log_scale, temperature, standardize, vocab_size, k, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, index, column_mask, log_scale, ctx.temperature, _, ctx.vocab_size, _, ctx.backend = inputs
        _, columns, _, *saved = output
        ctx.log_scale_dtype = None if log_scale is None else log_scale.dtype
        ctx.mark_non_differentiable(columns, *saved)
        ctx.save_for_backward(values, index, column_mask, columns, *saved)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_log_probabilities: Tensor, _: Tensor, grad_lse: Tensor, *__: Tensor
    ) -> tuple:
        grad_values, grad_log_scale = _backward(
            grad_log_probabilities.contiguous(),
            grad_lse.contiguous(),
            *saved,
            ctx.temperature,
            ctx.vocab_size,
            ctx.backend,
        )
        scale = None if ctx.log_scale_dtype is None else grad_log_scale.to(ctx.log_scale_dtype)
        return grad_values, None, None, scale, None, None, None, None, None


_operator = differentiable_operator(
    f"topk_softmax({_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}",
    fake=_forward_fake,
    function=TopkSoftmax,
    forward=FORWARD,
    backward=BACKWARD,
)


def topk_softmax(logits: Tensor | Logits, k: int, *, backend: str | None = None) -> TopK:
    """The k largest log-probabilities of every counted row, normalised over the whole row.

    What a teacher leaves of its logits to be stored or sent, and the head of a top-k loss::

        log_p = log_softmax(values / (temperature * scale));  log_probabilities, columns = log_p.topk(k)

    with ``log_probabilities = values[columns] / (temperature * scale) - lse + log_scale``. The mass of the columns that
    are not kept is ``1 - exp(log_probabilities).sum(-1)`` where there is no log scale. ``rank_truncate`` with scope
    ``"token"`` ranks alike, by probabilities and without ``lse``.

    Args:
        logits: ``[B, T, V]`` or ``[N, V]``, float16, bfloat16, float32 or float64, or ``Logits``. A counted row with
            NaN, or with nothing but ``-inf``, gives NaN in all its log-probabilities and its ``lse``, and its columns
            mean nothing.
        k: how many columns, 1 to the vocabulary's size.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        TopK. Columns stand in descending order of their logits, the lower index first among equals (``torch.topk``
        promises no order there); columns that ``logits.columns`` leaves out come last, with log-probability ``-inf``.
        Differentiable once with respect to ``values`` and ``log_scale``, through ``log_probabilities`` and ``lse``;
        the choice of columns passes no gradient on. Gradients have their inputs' dtypes.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or range; k is above the vocabulary's size.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    z = prepare(logits)
    checks.integer("k", k, 1, z.side.vocab_size, "the vocabulary's size")
    log_probabilities, columns, lse, *_ = _operator(*z.side, k, backend=backend)
    return TopK(z.restore(log_probabilities), z.restore(columns), z.restore(lse))
