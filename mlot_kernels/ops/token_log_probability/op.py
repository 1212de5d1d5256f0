"""Log-probability of one given token in every row, and its gradient, in one read of the logits each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits, prepare
from mlot_kernels.native import native
from mlot_kernels.ops.token_log_probability import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator

_INPUTS = "Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, Tensor tokens"
_OPTIONS = "float temperature, bool standardize, SymInt vocab_size, str backend"
_SAVED = "Tensor peak, Tensor log_total, Tensor expected, Tensor mean, Tensor scale, Tensor slope"
_OUTPUTS = f"(Tensor log_probability, {_SAVED})"

_TRITON = "mlot_kernels.ops.token_log_probability.triton_kernels"

FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "token_log_probability_forward"),
    "triton": lazy(_TRITON, "forward"),
    "cuda": native("cuda", "token_log_probability_forward"),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "token_log_probability_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "token_log_probability_backward"),
}


def _forward_fake(values: Tensor, index: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(values.new_empty(index.shape, dtype=accumulator(values.dtype)) for _ in range(7))


def _backward_fake(grad: Tensor, values: Tensor, index: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), grad.new_empty(index.shape)


_forward = raw_operator(
    f"token_log_probability_forward({_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}",
    fake=_forward_fake,
    implementations=FORWARD,
)
_backward = raw_operator(
    "token_log_probability_backward(Tensor grad, Tensor values, Tensor index, Tensor? column_mask, Tensor tokens, "
    f"{_SAVED}, float temperature, SymInt vocab_size, str backend) -> (Tensor grad_values, Tensor grad_log_scale)",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class TokenLogProbability(torch.autograd.Function):
    @staticmethod
    def forward(
        values: Tensor,
        index: Tensor,
        column_mask: Tensor | None,
        log_scale: Tensor | None,
        tokens: Tensor,
        temperature: float,
        standardize: bool,
        vocab_size: int,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _forward(values, index, column_mask, log_scale, tokens, temperature, standardize, vocab_size, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, index, column_mask, log_scale, tokens, ctx.temperature, _, ctx.vocab_size, ctx.backend = inputs
        _, *saved = output
        ctx.log_scale_dtype = None if log_scale is None else log_scale.dtype
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(values, index, column_mask, tokens, *saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_values, grad_log_scale = _backward(grad.contiguous(), *saved, ctx.temperature, ctx.vocab_size, ctx.backend)
        scale = None if ctx.log_scale_dtype is None else grad_log_scale.to(ctx.log_scale_dtype)
        return grad_values, None, None, scale, None, None, None, None, None


_operator = differentiable_operator(
    f"token_log_probability({_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}",
    fake=_forward_fake,
    function=TokenLogProbability,
    forward=FORWARD,
    backward=BACKWARD,
)


def token_log_probability(logits: Tensor | Logits, tokens: Tensor, *, backend: str | None = None) -> Tensor:
    """Log-probability of one given token in every counted row.

    ``log_softmax(values / (temperature * scale))[token] + log_scale``: what merges the rows of a token group, whose
    probability is the product of its tokens' (Universal Logit Distillation as in TRL's GOLD, and X-Token, arXiv
    2605.21699), and, with the opposite sign, the cross-entropy of each row. For labels as a model takes them, ``[B,
    T]``::

        rows = Rows.from_labels(labels)  # row i predicts token i + 1
        log_p = token_log_probability(Logits(logits, rows), labels.gather(1, rows.index + 1))

    Args:
        logits: ``[B, T, V]`` or ``[N, V]``, float16, bfloat16, float32 or float64, or ``Logits``. A counted row with
            NaN gives NaN, in that row only.
        tokens: int64 ``[B, A]``, in the order of the counted rows; ``[N]`` for ``[N, V]`` logits. Those beyond the
            counted rows are never read. A token that is none of ``0..vocab_size-1`` gives NaN, one that
            ``logits.columns`` leaves out ``-inf``; neither passes a gradient on.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        ``[B, A]`` (``[N]`` for ``[N, V]``), float32 (float64 for float64 logits), 0 beyond the counted rows; ``-inf``
        where the token's logit is. Differentiable once with respect to ``values`` and ``log_scale``; gradients have
        their dtypes.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or range.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    z = prepare(logits)
    shape = "[A]" if z.one_sequence else "[B, A]"
    checks.tensor("tokens", tokens, shape, (torch.int64,))
    checks.sized(
        "tokens",
        tokens,
        z.side.row_index.shape[1:] if z.one_sequence else z.side.row_index.shape,
        f"{shape} as the rows",
    )
    checks.same_device(logits=z.side.values, tokens=tokens)
    log_probability = _operator(
        *z.side[:4],
        tokens.unsqueeze(0) if z.one_sequence else tokens,
        *z.side[4:],
        backend=backend,
    )[0]
    return z.restore(log_probability)
