"""Entropic transport between two sequences of features, without their cost matrix in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.native import native
from mlot_kernels.ops.transport_cost import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator
from mlot_kernels.transport import (
    METRICS,
    OPTIONS_SCHEMA,
    TENSORS_SCHEMA,
    Transport,
    TransportOptions,
    prepare_options,
    refusing_but_l1,
    refusing_implicit,
)

_INPUTS = f"Tensor x, Tensor y, {TENSORS_SCHEMA}, str metric, {OPTIONS_SCHEMA}"
_SAVED = "Tensor row_potential, Tensor column_potential, Tensor done, Tensor row_history, Tensor column_history"
_OUTPUTS = f"(Tensor transported, Tensor regularized, {_SAVED})"

_TRITON = "mlot_kernels.ops.transport_cost.triton_kernels"

FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "transport_cost_forward"),
    "triton": refusing_implicit(lazy(_TRITON, "forward"), 13),
    "cuda": refusing_but_l1(refusing_implicit(native("cuda", "transport_cost_forward"), 13), 7),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "transport_cost_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "transport_cost_backward"),
}


def _forward_fake(x: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    options = TransportOptions(*arguments[:5], *arguments[6:12])
    (B, M), N = x.shape[:2], y.shape[1]
    kept = options.iterations if options.gradient == "unrolled" else 0
    wide = checks.accumulator(torch.promote_types(x.dtype, y.dtype))
    shapes = ((B,), (B,), (B, M), (B, N), (B,), (B, kept, M), (B, kept, N))
    return tuple(x.new_empty(shape, dtype=torch.int64 if i == 4 else wide) for i, shape in enumerate(shapes))


def _backward_fake(grad_transported: Tensor, _: Tensor, x: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    (B, M), N = x.shape[:2], y.shape[1]
    features = (
        side.new_empty(side.shape if needed else (0,)) for side, needed in zip((x, y), arguments[17:19], strict=True)
    )
    return *features, *(grad_transported.new_empty(shape) for shape in ((B, M), (B, N), (B, N)))


_forward = raw_operator(
    f"transport_cost_forward({_INPUTS}, str backend) -> {_OUTPUTS}", fake=_forward_fake, implementations=FORWARD
)
_backward = raw_operator(
    f"transport_cost_backward(Tensor grad_transported, Tensor grad_regularized, {_INPUTS}, {_SAVED}, bool x_needed, "
    "bool y_needed, str backend) -> (Tensor grad_x, Tensor grad_y, Tensor grad_row_marginal, "
    "Tensor grad_column_marginal, Tensor grad_column_weight)",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class TransportCost(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        y: Tensor,
        row_marginal: Tensor | None,
        column_marginal: Tensor | None,
        row_lengths: Tensor | None,
        column_lengths: Tensor | None,
        column_weight: Tensor | None,
        metric: str,
        epsilon: float,
        iterations: int,
        marginals: str,
        tolerance: float,
        domain: str,
        gradient: str,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _forward(
            x,
            y,
            row_marginal,
            column_marginal,
            row_lengths,
            column_lengths,
            column_weight,
            metric,
            epsilon,
            iterations,
            marginals,
            tolerance,
            domain,
            gradient,
            backend,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *ctx.options, ctx.backend = inputs[7:]
        detached = output[:1] if inputs[13] == "envelope" else ()
        ctx.mark_non_differentiable(*detached, *output[2:])
        ctx.save_for_backward(*inputs[:7], *output[2:])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_transported: Tensor, grad_regularized: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        grad_x, grad_y, *others = _backward(
            grad_transported.contiguous(),
            grad_regularized.contiguous(),
            *saved[:7],
            *ctx.options,
            *saved[7:],
            *needed,
            ctx.backend,
        )
        for_rows, for_columns, for_weight = (
            None if input is None else gradient.to(input.dtype)
            for gradient, input in zip(others, (saved[2], saved[3], saved[6]), strict=True)
        )
        sides = (grad_x if needed[0] else None, grad_y if needed[1] else None)
        return *sides, for_rows, for_columns, None, None, for_weight, *[None] * 8


_operator = differentiable_operator(
    f"transport_cost({_INPUTS}, str backend) -> {_OUTPUTS}",
    fake=_forward_fake,
    function=TransportCost,
    forward=FORWARD,
    backward=BACKWARD,
)


def transport_cost(
    x: Tensor,
    y: Tensor,
    *,
    metric: str = "l1",
    epsilon: float = 0.1,
    iterations: int = 20,
    marginals: str | tuple[Tensor, Tensor] = "uniform",
    row_lengths: Tensor | None = None,
    column_lengths: Tensor | None = None,
    column_weight: Tensor | None = None,
    tolerance: float = 0.0,
    domain: str = "auto",
    gradient: str = "unrolled",
    backend: str | None = None,
) -> Transport:
    """``sinkhorn(pairwise_cost(x, y))`` as one operator: a fused backend keeps no cost matrix and no plan.

    Args:
        x: ``[B, M, D]``, y: ``[B, N, D]``; float16, bfloat16, float32 or float64, the two may differ; any strides. Rows
            beyond ``row_lengths`` and ``column_lengths`` are never read.
        metric: see ``pairwise_cost``.
        epsilon, iterations, marginals, row_lengths, column_lengths, column_weight, tolerance, domain, gradient: see
            ``sinkhorn``, whose rows are x's and whose columns are y's.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        Transport with ``plan`` None, float32 (float64 if either side is float64). Differentiable once as ``sinkhorn``
        is, with respect to x and y in place of the cost.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or range; ``gradient`` cannot serve an input
            that requires one.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    checks.tensor("x", x, "[B, M, D]")
    checks.tensor("y", y, "[B, N, D]")
    checks.sized("y", y, (x.shape[0], y.shape[1], x.shape[2]), "[B, N, D] with B and D of x")
    checks.choice("metric", metric, METRICS)
    options = prepare_options(
        (x.shape[0], x.shape[1], y.shape[1]),
        "x and y",
        x=x,
        y=y,
        epsilon=epsilon,
        iterations=iterations,
        marginals=marginals,
        row_lengths=row_lengths,
        column_lengths=column_lengths,
        column_weight=column_weight,
        tolerance=tolerance,
        domain=domain,
        gradient=gradient,
    )
    transported, regularized, row_potential, column_potential, done, *_ = _operator(
        x, y, *options[:5], metric, *options[5:], backend=backend
    )
    return Transport(transported, regularized, None, row_potential, column_potential, done)
