"""sinkhorn on a GPU: small problems in one program each, others in sweeps of one launch each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels import triton_transport_adjoint as adjoint
from mlot_kernels import triton_transport_resident as resident
from mlot_kernels import triton_transport_resident_adjoint as resident_adjoint
from mlot_kernels import triton_transport_streamed as streamed
from mlot_kernels.checks import accumulator
from mlot_kernels.triton_transport import envelope, marginals_of


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
) -> tuple[Tensor, ...]:
    B, M, N = cost.shape
    kept = iterations if gradient == "unrolled" else 0
    shapes = ((B,), (B,), (B, M, N) if return_plan else (0,), (B, M), (B, N), (B,), (B, kept, M), (B, kept, N))
    wide = accumulator(cost.dtype)
    outputs = tuple(cost.new_empty(shape, dtype=torch.int64 if i == 5 else wide) for i, shape in enumerate(shapes))
    if B:
        a, b = marginals_of(cost, row_marginal, column_marginal, row_lengths, column_lengths, marginals)
        weight = None if column_weight is None else column_weight.contiguous()
        how: tuple[Any, ...] = (epsilon, iterations, tolerance, domain, kept > 0, return_plan)
        (resident if resident.holds(cost) else streamed).solve(cost, a, b, weight, outputs, *how)
    return outputs


def backward(
    grad_transported: Tensor,
    grad_regularized: Tensor,
    grad_plan: Tensor,
    cost: Tensor,
    row_marginal: Tensor | None,
    column_marginal: Tensor | None,
    row_lengths: Tensor | None,
    column_lengths: Tensor | None,
    column_weight: Tensor | None,
    row_potential: Tensor,
    column_potential: Tensor,
    done: Tensor,
    row_history: Tensor,
    column_history: Tensor,
    epsilon: float,
    iterations: int,
    marginals: str,
    tolerance: float,
    domain: str,
    gradient: str,
    return_plan: bool,
) -> tuple[Tensor, ...]:
    B, M, N = cost.shape
    gradients = tuple(grad_transported.new_empty(shape) for shape in ((B, M, N), (B, M), (B, N), (B, N)))
    if B == 0:
        return gradients
    a, b = marginals_of(cost, row_marginal, column_marginal, row_lengths, column_lengths, marginals)
    if gradient == "envelope":
        envelope(grad_regularized, cost, a, b, row_potential, column_potential, gradients[0], epsilon)
        return gradients[0], *(x.zero_() for x in gradients[1:])
    upstream = (grad_transported.contiguous(), grad_regularized.contiguous(), grad_plan.contiguous())
    weight = None if column_weight is None else column_weight.contiguous()
    histories = (row_history, column_history)
    (resident_adjoint if resident.holds(cost) else adjoint).differentiate(
        upstream, cost, a, b, weight, done, histories, gradients, epsilon, iterations, domain, return_plan
    )
    return gradients
