"""Entropic transport between two sequences of features: hidden states, or anything with a cost between two tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.losses.common import Loss, check_backend, check_reduction, reduce
from mlot_kernels.ops.transport_cost import transport_cost
from mlot_kernels.transport import DOMAINS, GRADIENTS, MARGINALS, METRICS, within


def sequence_transport_loss(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    metric: str = "cosine",
    epsilon: float = 0.1,
    iterations: int = 20,
    marginals: str = "uniform",
    tolerance: float = 0.0,
    regularized: bool = False,
    domain: str = "auto",
    gradient: str = "unrolled",
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    token_weight: Tensor | None = None,
    return_components: bool = False,
    backend: str | None = None,
) -> Any:
    """The cost of carrying one sequence's features to the other's, ``<P, C>`` with P from Sinkhorn's iteration.

    For hidden states of two models, projected to one width; the sequences may have any lengths.

    Args:
        x: ``[B, M, D]``, y: ``[B, N, D]``; float16, bfloat16, float32 or float64, the two may differ.
        x_lengths, y_lengths: ``[B]`` int, how many rows count; the rest is never read. None: all.
        metric: cost of a pair, see ``pairwise_cost``.
        epsilon, iterations, marginals, tolerance, domain, gradient: see ``sinkhorn``; marginals by name only. With
            ``"uniform"`` the loss is a mean over the sequence, with ``"unit"`` a sum over y's rows.
        regularized: ``<P, C> + epsilon KL(P | a b^T)`` instead of ``<P, C>``; needed for ``gradient="envelope"``.
        reduction: ``"none"`` ``[B]``, ``"sum"``, or ``"mean"`` over the sequences in which rows count on both sides.
        num_items_in_batch: replaces the mean's denominator.
        token_weight: ``[B, N]``, multiplies the columns of ``P * C``, y's rows; not for ``regularized``.
        return_components: also return a dict of detached scalars: ``transport``, reduced as the mean, and
            ``iterations``, the mean number of steps.
        backend: run all operators on this backend or raise.

    Returns:
        The loss, float32 (float64 where either side is float64), differentiable with respect to x and y; or ``(loss,
        components)``. A sequence with no row on either side costs 0.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    _check_options(metric, epsilon, iterations, marginals, tolerance, regularized, domain, gradient)
    check_reduction(reduction, num_items_in_batch)
    if regularized and token_weight is not None:
        raise ValueError("token_weight is no part of the regularised cost; leave it out or pass regularized=False")
    solved = transport_cost(
        x,
        y,
        metric=metric,
        epsilon=epsilon,
        iterations=iterations,
        marginals=marginals,
        row_lengths=x_lengths,
        column_lengths=y_lengths,
        column_weight=token_weight,
        tolerance=tolerance,
        domain=domain,
        gradient=gradient,
        backend=backend,
    )
    per_sequence = solved.regularized_cost if regularized else solved.cost
    B, M, N = x.shape[0], x.shape[1], y.shape[1]
    filled = within(x_lengths, B, M, x.device).any(1) & within(y_lengths, B, N, y.device).any(1)
    loss = reduce(per_sequence, filled, reduction, num_items_in_batch)
    if not return_components:
        return loss
    steps = solved.iterations.to(per_sequence.dtype)
    return loss, {
        "transport": reduce(per_sequence.detach(), filled, "mean", num_items_in_batch),
        "iterations": reduce(steps * filled, filled, "mean"),
    }


def _check_options(
    metric: str,
    epsilon: float,
    iterations: int,
    marginals: str,
    tolerance: float,
    regularized: bool,
    domain: str,
    gradient: str,
) -> None:
    checks.choice("metric", metric, METRICS)
    checks.number("epsilon", epsilon, above=0)
    checks.integer("iterations", iterations, 1)
    checks.choice("marginals", marginals, MARGINALS)
    checks.number("tolerance", tolerance, least=0)
    checks.boolean("regularized", regularized)
    checks.choice("domain", domain, DOMAINS)
    checks.choice("gradient", gradient, GRADIENTS)
    if gradient == "envelope" and not regularized:
        raise ValueError("gradient='envelope' is that of the regularised cost; pass regularized=True, too")


class SequenceTransportLoss(Loss):
    """Transport between two sequences of features as a module; the options are those of ``sequence_transport_loss``."""

    def __init__(
        self,
        *,
        metric: str = "cosine",
        epsilon: float = 0.1,
        iterations: int = 20,
        marginals: str = "uniform",
        tolerance: float = 0.0,
        regularized: bool = False,
        domain: str = "auto",
        gradient: str = "unrolled",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        _check_options(metric, epsilon, iterations, marginals, tolerance, regularized, domain, gradient)
        check_reduction(reduction)
        check_backend(backend)
        super().__init__(
            sequence_transport_loss,
            metric=metric,
            epsilon=epsilon,
            iterations=iterations,
            marginals=marginals,
            tolerance=tolerance,
            regularized=regularized,
            domain=domain,
            gradient=gradient,
            reduction=reduction,
            backend=backend,
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        x_lengths: Tensor | None = None,
        y_lengths: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | float | None = None,
        token_weight: Tensor | None = None,
        return_components: bool = False,
    ) -> Any:
        return self.function(
            x,
            y,
            x_lengths,
            y_lengths,
            **self.options,
            num_items_in_batch=num_items_in_batch,
            token_weight=token_weight,
            return_components=return_components,
        )
