"""Entropy of the softmax of every row, and its gradient, in one read of the logits each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits, prepare
from mlot_kernels.native import native
from mlot_kernels.ops.row_entropy import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator

_INPUTS = "Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale"
_SAVED = "Tensor mass, Tensor peak, Tensor log_total, Tensor mean, Tensor scale, Tensor slope, Tensor moment"
_OPTIONS = "float temperature, bool standardize, SymInt vocab_size, str backend"

_TRITON = "mlot_kernels.ops.row_entropy.triton_kernels"

FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "row_entropy_forward"),
    "triton": lazy(_TRITON, "forward"),
    "cuda": native("cuda", "row_entropy_forward"),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "row_entropy_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "row_entropy_backward"),
}


def _forward_fake(values: Tensor, index: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(values.new_empty(index.shape, dtype=accumulator(values.dtype)) for _ in range(8))


def _backward_fake(grad: Tensor, values: Tensor, index: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), grad.new_empty(index.shape)


_forward = raw_operator(
    f"row_entropy_forward({_INPUTS}, {_OPTIONS}) -> (Tensor entropy, {_SAVED})",
    fake=_forward_fake,
    implementations=FORWARD,
)
_backward = raw_operator(
    f"row_entropy_backward(Tensor grad, {_INPUTS}, Tensor entropy, {_SAVED}, "
    "float temperature, SymInt vocab_size, str backend) -> (Tensor grad_values, Tensor grad_log_scale)",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class RowEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        values: Tensor,
        index: Tensor,
        column_mask: Tensor | None,
        log_scale: Tensor | None,
        temperature: float,
        standardize: bool,
        vocab_size: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _forward(values, index, column_mask, log_scale, temperature, standardize, vocab_size, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, index, column_mask, log_scale, ctx.temperature, _, ctx.vocab_size, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(values, index, column_mask, log_scale, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_values, grad_log_scale = _backward(grad.contiguous(), *saved, ctx.temperature, ctx.vocab_size, ctx.backend)
        log_scale = saved[3]
        for_scale = None if log_scale is None else grad_log_scale.to(log_scale.dtype)
        return grad_values, None, None, for_scale, None, None, None, None


_operator = differentiable_operator(
    f"row_entropy({_INPUTS}, {_OPTIONS}) -> (Tensor entropy, {_SAVED})",
    fake=_forward_fake,
    function=RowEntropy,
    forward=FORWARD,
    backward=BACKWARD,
)


def row_entropy(logits: Tensor | Logits, *, backend: str | None = None) -> Tensor:
    """Entropy, in nats, of every counted row's distribution.

    ``H_a = -sum_v p_av log p_av`` over the columns that ``logits`` looks at; where these are all and there is no log
    scale, ``H = lse(z) - sum_v softmax(z)_v z_v``.

    Args:
        logits: ``[B, T, V]`` or ``[N, V]``, float16, bfloat16, float32 or float64, or ``Logits``. A counted row with
            NaN gives NaN, in that row only.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        ``[B, A]`` (``[N]`` for ``[N, V]``), float32 (float64 for float64 logits), 0 beyond the counted rows.
        Differentiable once with respect to ``values`` and ``log_scale``; gradients have their dtypes.

    Raises:
        TypeError, ValueError: a field of ``logits`` has another type, dtype, shape or range.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    z = prepare(logits)
    entropy = _operator(*z.side, backend=backend)[0]
    return z.restore(entropy)
