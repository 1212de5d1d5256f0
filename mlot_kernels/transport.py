"""What the transport operators share: their options, with checks, and their result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.backends import refusing

METRICS = ("l1", "l2", "sqeuclidean", "cosine", "cross_entropy")
MARGINALS = ("uniform", "unit")
DOMAINS = ("auto", "log", "scaling")
GRADIENTS = ("unrolled", "envelope", "implicit")

TENSORS_SCHEMA = (
    "Tensor? row_marginal, Tensor? column_marginal, Tensor? row_lengths, Tensor? column_lengths, Tensor? column_weight"
)
OPTIONS_SCHEMA = "float epsilon, int iterations, str marginals, float tolerance, str domain, str gradient"


def refusing_implicit(forward: Callable[..., Any], gradient: int) -> Callable[..., Any]:
    """A backend's ``forward`` without ``gradient="implicit"``, the argument of number ``gradient``."""

    def refuses(*arguments: Any) -> str | None:
        if arguments[gradient] == "implicit":
            return "it has no gradient='implicit'; pass gradient='unrolled', or backend='reference'"
        return None

    return refusing(forward, refuses)


def refusing_but_l1(forward: Callable[..., Any], metric: int) -> Callable[..., Any]:
    """A backend's ``forward`` with ``metric="l1"`` alone, the argument of number ``metric``."""

    def refuses(*arguments: Any) -> str | None:
        if arguments[metric] != "l1":
            return "it has metric='l1' alone; pass backend='triton' or backend='reference', which have all of them"
        return None

    return refusing(forward, refuses)


class Transport(NamedTuple):
    """The result of ``sinkhorn`` and ``transport_cost``, float32 (float64 for float64 inputs).

    Attributes:
        cost: ``[B]``, ``sum_ij P_ij C_ij w_j``. Detached for ``gradient="envelope"``.
        regularized_cost: ``[B]``, ``sum_ij P_ij C_ij + epsilon P_ij log(P_ij / (a_i b_j))``, without the column weight.
        plan: ``[B, M, N]``, ``P = exp((f + g - C) / epsilon)``, 0 beyond the lengths; None unless asked for.
        row_potential, column_potential: f ``[B, M]`` and g ``[B, N]``, 0 beyond the lengths; no gradient.
        iterations: ``[B]`` int64, how many each problem took.
    """

    cost: Tensor
    regularized_cost: Tensor
    plan: Tensor | None
    row_potential: Tensor
    column_potential: Tensor
    iterations: Tensor


class TransportOptions(NamedTuple):
    """Checked options as the schemas take them: the fields of ``TENSORS_SCHEMA``, then those of ``OPTIONS_SCHEMA``."""

    row_marginal: Tensor | None  # [B, M]
    column_marginal: Tensor | None  # [B, N]
    row_lengths: Tensor | None  # [B]
    column_lengths: Tensor | None  # [B]
    column_weight: Tensor | None  # [B, N]
    epsilon: float
    iterations: int
    marginals: str
    tolerance: float
    domain: str
    gradient: str


def prepare_options(
    sizes: tuple[int, int, int],
    what: str,
    *,
    epsilon: float,
    iterations: int,
    marginals: Any,
    row_lengths: Any,
    column_lengths: Any,
    column_weight: Any,
    tolerance: float,
    domain: str,
    gradient: str,
    **inputs: Tensor,
) -> TransportOptions:
    """Check what a caller passed to a transport operator.

    Args:
        sizes: B, M and N.
        what: whose sizes these are, for messages.
        inputs: the operator's own tensors, which must be on the same device.

    Raises:
        TypeError, ValueError: an option has another type, dtype, shape or range, or ``gradient`` cannot serve an input
            that requires one.
    """
    B, M, N = sizes
    checks.choice("domain", domain, DOMAINS)
    checks.choice("gradient", gradient, GRADIENTS)
    a, b = None, None
    if isinstance(marginals, str):
        checks.choice("marginals", marginals, MARGINALS)
    elif isinstance(marginals, tuple) and len(marginals) == 2:
        a, b = marginals
        checks.sized("marginals[0]", checks.tensor("marginals[0]", a, "[B, M]"), (B, M), f"[B, M] of {what}")
        checks.sized("marginals[1]", checks.tensor("marginals[1]", b, "[B, N]"), (B, N), f"[B, N] of {what}")
        marginals = "given"
    else:
        raise TypeError(f"marginals must be 'uniform', 'unit' or two tensors (a, b), got {marginals!r}")
    for name, lengths in (("row_lengths", row_lengths), ("column_lengths", column_lengths)):
        if lengths is not None:
            checks.sized(name, checks.tensor(name, lengths, "[B]", checks.INTEGERS), (B,), f"[B] of {what}")
    if column_weight is not None:
        checks.tensor("column_weight", column_weight, "[B, N]")
        checks.sized("column_weight", column_weight, (B, N), f"[B, N] of {what}")
    checks.same_device(
        **inputs,
        **{"marginals[0]": a, "marginals[1]": b},
        row_lengths=row_lengths,
        column_lengths=column_lengths,
        column_weight=column_weight,
    )
    for name, value in (("marginals[0]", a), ("marginals[1]", b)):
        if gradient != "unrolled" and value is not None and value.requires_grad:
            raise ValueError(f"{name} requires a gradient, which only gradient='unrolled' gives; got {gradient!r}")
    if gradient == "envelope" and column_weight is not None and column_weight.requires_grad:
        raise ValueError("column_weight requires a gradient, which gradient='envelope' does not give; pass 'unrolled'")
    return TransportOptions(
        a,
        b,
        row_lengths,
        column_lengths,
        column_weight,
        checks.number("epsilon", epsilon, above=0),
        checks.integer("iterations", iterations, 1),
        marginals,
        checks.number("tolerance", tolerance, least=0),
        domain,
        gradient,
    )


def within(lengths: Tensor | None, B: int, n: int, device: torch.device) -> Tensor:
    """``[B, n]`` bool, True in front of each length; all True for None."""
    position = torch.arange(n, device=device).expand(B, n)
    return position >= 0 if lengths is None else position < lengths[:, None]
