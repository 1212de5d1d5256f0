"""Entropic optimal transport: Sinkhorn's iteration on a batch of cost matrices, and its exact gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.native import native
from mlot_kernels.ops.sinkhorn import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator
from mlot_kernels.transport import OPTIONS_SCHEMA, TENSORS_SCHEMA, Transport, prepare_options, refusing_implicit

_INPUTS = f"Tensor cost, {TENSORS_SCHEMA}"
_OPTIONS = f"{OPTIONS_SCHEMA}, bool return_plan, str backend"
# What the histories hold, [B, L, M] and [B, L, N], is a matter between a backend's forward and its backward.
_OUTPUTS = (
    "(Tensor transported, Tensor regularized, Tensor plan, Tensor row_potential, Tensor column_potential, Tensor done, "
    "Tensor row_history, Tensor column_history)"
)

_TRITON = "mlot_kernels.ops.sinkhorn.triton_kernels"

FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "sinkhorn_forward"),
    "triton": refusing_implicit(lazy(_TRITON, "forward"), 11),
    "cuda": refusing_implicit(native("cuda", "sinkhorn_forward"), 11),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "sinkhorn_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "sinkhorn_backward"),
}


def _forward_fake(
    cost: Tensor,
    row_marginal: Tensor | None,
    column_marginal: Tensor | None,
    row_lengths: Tensor | None,
    column_lengths: Tensor | None,
    column_weight: Tensor | None,
    epsilon: float,
    iterations: int,
    marginals: str,
    tolerance: float,
    domain: str,
    gradient: str,
    return_plan: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    B, M, N = cost.shape
    kept = iterations if gradient == "unrolled" else 0
    shapes = ((B,), (B,), (B, M, N) if return_plan else (0,), (B, M), (B, N), (B,), (B, kept, M), (B, kept, N))
    wide = checks.accumulator(cost.dtype)
    return tuple(cost.new_empty(shape, dtype=torch.int64 if i == 5 else wide) for i, shape in enumerate(shapes))


def _backward_fake(
    grad_transported: Tensor, grad_regularized: Tensor, grad_plan: Tensor, cost: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    B, M, N = cost.shape
    return tuple(grad_transported.new_empty(shape) for shape in ((B, M, N), (B, M), (B, N), (B, N)))


_forward = raw_operator(
    f"sinkhorn_forward({_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}", fake=_forward_fake, implementations=FORWARD
)
_backward = raw_operator(
    f"sinkhorn_backward(Tensor grad_transported, Tensor grad_regularized, Tensor grad_plan, {_INPUTS}, "
    "Tensor row_potential, Tensor column_potential, Tensor done, Tensor row_history, Tensor column_history, "
    f"{_OPTIONS}) "
    "-> (Tensor grad_cost, Tensor grad_row_marginal, Tensor grad_column_marginal, Tensor grad_column_weight)",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(
        cost: Tensor,
        row_marginal: Tensor | None,
        column_marginal: Tensor | None,
        row_lengths: Tensor | None,
        column_lengths: Tensor | None,
        column_weight: Tensor | None,
        epsilon: float,
        iterations: int,
        marginals: str,
        tolerance: float,
        domain: str,
        gradient: str,
        return_plan: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _forward(
            cost,
            row_marginal,
            column_marginal,
            row_lengths,
            column_lengths,
            column_weight,
            epsilon,
            iterations,
            marginals,
            tolerance,
            domain,
            gradient,
            return_plan,
            backend,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.options = inputs[:6], inputs[6:]
        *_, gradient, return_plan, _ = ctx.options
        transported, _, plan, *saved = output
        detached = (transported, plan) if gradient == "envelope" else () if return_plan else (plan,)
        ctx.mark_non_differentiable(*detached, *saved)
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        saved: tuple[Any, ...],
        grad_transported: Tensor,
        grad_regularized: Tensor,
        grad_plan: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor | None, ...]:
        gradients = _backward(
            grad_transported.contiguous(),
            grad_regularized.contiguous(),
            grad_plan.contiguous(),
            *saved,
            *ctx.options,
        )
        inputs = (*saved[:3], saved[5])  # the cost, the marginals, the column weight
        for_cost, for_rows, for_columns, for_weight = (
            None if input is None else gradient.to(input.dtype)
            for gradient, input in zip(gradients, inputs, strict=True)
        )
        return for_cost, for_rows, for_columns, None, None, for_weight, *[None] * 8


_operator = differentiable_operator(
    f"sinkhorn({_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}",
    fake=_forward_fake,
    function=Sinkhorn,
    forward=FORWARD,
    backward=BACKWARD,
)


def sinkhorn(
    cost: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    marginals: str | tuple[Tensor, Tensor] = "uniform",
    row_lengths: Tensor | None = None,
    column_lengths: Tensor | None = None,
    column_weight: Tensor | None = None,
    tolerance: float = 0.0,
    domain: str = "auto",
    gradient: str = "unrolled",
    return_plan: bool = False,
    backend: str | None = None,
) -> Transport:
    """Sinkhorn's iteration, rows first and columns last, on a batch of problems that are each judged by themselves.

    From ``v_0 = 1`` on, with ``K = exp(-C / epsilon)`` (Cuturi 2013, arXiv 1306.0895)::

        u_l = a / (K v_(l-1));   v_l = b / (K^T u_l);   P = diag(u_L) K diag(v_L)

    Args:
        cost: ``[B, M, N]``, float16, bfloat16, float32 or float64, any strides. ``inf`` forbids a pair; a row or column
            with weight that has only such pairs gives NaN.
        epsilon: weight of the entropy, in units of the cost; above 0.
        iterations: how many at the most, at least 1.
        marginals: ``"uniform"``: 1/M and 1/N of the problem's own lengths. ``"unit"``: every row and then every column
            is normalised to 1, as in the Multi-Level-OT paper; columns sum to 1 and, where M != N, rows to N/M.
            ``(a [B, M], b [B, N])``: given, not negative, of equal sums; a row or column with 0 takes no part, as if
            it lay beyond the lengths.
        row_lengths, column_lengths: ``[B]`` int, a problem is ``cost[b, :row_lengths[b], :column_lengths[b]]``; the
            rest is never read. Length 0 costs 0.
        column_weight: ``[B, N]``, multiplies the columns of ``P * C`` in ``Transport.cost``, after transport.
        tolerance: a problem stops after a step that moved no ``log v`` by more than this; 0: exactly ``iterations``.
        domain: where to iterate. ``"log"``: on log-scalings, 2 exp per element and step. ``"scaling"``: on u and v,
            with absorption into the kernel where they grow. Both agree as long as ``(max C - min C) / epsilon`` leaves
            digits in the dtype (below some 1e6 in float32). ``"auto"``: scalings for a problem where it is at most 80,
            else log.
        gradient: ``"unrolled"``: the exact derivative of the steps taken. ``"implicit"``: of the limit, by one linear
            solve, for plans that have converged. ``"envelope"``: ``dregularized_cost/dC = P``, exact in the limit; then
            ``cost`` and ``plan`` are detached.
        return_plan: also return P.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        Transport. Differentiable once: ``unrolled`` and ``implicit`` through ``cost``, ``regularized_cost`` and
        ``plan``, with respect to ``cost`` and ``column_weight``, ``unrolled`` also with respect to given marginals (0
        where a marginal is 0); ``envelope`` through ``regularized_cost``, with respect to ``cost``.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or range; ``gradient`` cannot serve an input
            that requires one.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    if isinstance(cost, Tensor) and cost.dim() == 2:
        raise ValueError(f"cost must be [B, M, N], got {tuple(cost.shape)}; pass cost[None] for one problem")
    checks.tensor("cost", cost, "[B, M, N]")
    options = prepare_options(
        (cost.shape[0], cost.shape[1], cost.shape[2]),
        "cost",
        cost=cost,
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
    transported, regularized, plan, row_potential, column_potential, done, *_ = _operator(
        cost, *options, checks.boolean("return_plan", return_plan), backend=backend
    )
    return Transport(transported, regularized, plan if return_plan else None, row_potential, column_potential, done)
