"""Costs between all pairs of feature vectors of two sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.native import native
from mlot_kernels.ops.pairwise_cost import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator
from mlot_kernels.transport import METRICS, refusing_but_l1

_TRITON = "mlot_kernels.ops.pairwise_cost.triton_kernels"

FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "pairwise_cost_forward"),
    "triton": lazy(_TRITON, "forward"),
    "cuda": refusing_but_l1(native("cuda", "pairwise_cost_forward"), 2),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "pairwise_cost_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "pairwise_cost_backward"),
}


def _forward_fake(x: Tensor, y: Tensor, metric: str, backend: str) -> Tensor:
    wide = checks.accumulator(torch.promote_types(x.dtype, y.dtype))
    return x.new_empty((x.shape[0], x.shape[1], y.shape[1]), dtype=wide)


def _backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, metric: str, x_needed: bool, y_needed: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if x_needed else (0,)), y.new_empty(y.shape if y_needed else (0,))


_forward = raw_operator(
    "pairwise_cost_forward(Tensor x, Tensor y, str metric, str backend) -> Tensor",
    fake=_forward_fake,
    implementations=FORWARD,
)
_backward = raw_operator(
    "pairwise_cost_backward(Tensor grad, Tensor x, Tensor y, str metric, bool x_needed, bool y_needed, str backend) "
    "-> (Tensor grad_x, Tensor grad_y)",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class PairwiseCost(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor, metric: str, backend: str) -> Tensor:
        return _forward(x, y, metric, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.metric, ctx.backend = inputs
        ctx.save_for_backward(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        x_needed, y_needed = ctx.needs_input_grad[:2]
        grad_x, grad_y = _backward(grad.contiguous(), *saved, ctx.metric, x_needed, y_needed, ctx.backend)
        return grad_x if x_needed else None, grad_y if y_needed else None, None, None


_operator = differentiable_operator(
    "pairwise_cost(Tensor x, Tensor y, str metric, str backend) -> Tensor",
    fake=_forward_fake,
    function=PairwiseCost,
    forward=FORWARD,
    backward=BACKWARD,
)


def pairwise_cost(x: Tensor, y: Tensor, *, metric: str = "l1", backend: str | None = None) -> Tensor:
    """``cost[b, i, j]`` between ``x[b, i]`` and ``y[b, j]``.

    ========================  ==============================================================================
    ``"l1"``                  ``sum_d |x_d - y_d|``; its gradient is 0 where ``x_d = y_d``
    ``"l2"``                  ``sqrt(sum_d (x_d - y_d)^2)``; its gradient is 0 where ``x = y``
    ``"sqeuclidean"``         ``sum_d (x_d - y_d)^2``
    ``"cosine"``              ``1 - x . y / (|x| |y|)``; a norm below 1e-8 counts as 1e-8, as in
                              ``torch.nn.functional.cosine_similarity``
    ``"cross_entropy"``       ``-sum_d x_d log y_d`` of probabilities; ``y_d = 0`` counts only where ``x_d > 0``, and
                              makes the cost infinite there
    ========================  ==============================================================================

    Args:
        x: ``[B, M, D]``, y: ``[B, N, D]``; float16, bfloat16, float32 or float64, the two may differ; any strides.
        metric: one of the above.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        ``[B, M, N]``, float32 (float64 if either side is float64). Differentiable once with respect to both; an
        infinite cost whose upstream gradient is 0 passes 0 on.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    checks.tensor("x", x, "[B, M, D]")
    checks.tensor("y", y, "[B, N, D]")
    checks.sized("y", y, (x.shape[0], y.shape[1], x.shape[2]), "[B, N, D] with B and D of x")
    checks.choice("metric", metric, METRICS)
    checks.same_device(x=x, y=y)
    return _operator(x, y, metric, backend=backend)
