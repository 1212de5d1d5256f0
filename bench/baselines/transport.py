"""What a user writes or installs today for the transport operators: eager PyTorch, POT and GeomLoss.

16-bit inputs are taken to float32 first. Each function returns a tuple of outputs. POT and GeomLoss are imported by the
functions that call them.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.baselines.rows import wide


def pairwise_l1(x: Tensor, y: Tensor) -> tuple[Tensor]:
    """``[B, M, D]`` and ``[B, N, D]`` -> L1 distances ``[B, M, N]``."""
    return (torch.cdist(wide(x), wide(y), p=1),)


def pairwise_l1_by_broadcasting(x: Tensor, y: Tensor) -> tuple[Tensor]:
    """The same through ``[B, M, N, D]``: the better one under ``torch.compile``, which does not make that tensor."""
    return ((wide(x)[:, :, None] - wide(y)[:, None]).abs().sum(-1),)


def sinkhorn(cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor]:
    """Sinkhorn's iteration between unit marginals on scaling vectors: rows first, columns last.

    Args:
        cost: ``[B, M, N]``. A row whose costs are all above some 88 epsilon (float32) gives NaN.

    Returns:
        ``sum(P * C)``, ``[B]``.
    """
    cost = wide(cost)
    M, N = cost.shape[1:]
    kernel = (-cost / epsilon).exp()
    v = cost.new_ones(cost.shape[0], 1, N)
    for _ in range(iterations):
        # N / M, not 1: where M != N the scalings would grow without bound. Columns come last, so P is the same.
        u = (N / M) / (kernel * v).sum(2, keepdim=True)
        v = 1 / (kernel * u).sum(1, keepdim=True)
    return ((u * kernel * v * cost).sum((1, 2)),)


def sinkhorn_by_matmul(cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor]:
    """The same on products with the kernel: slow in eager torch on a CPU, the better one under ``torch.compile``."""
    cost = wide(cost)
    M, N = cost.shape[1:]
    kernel = (-cost / epsilon).exp()
    v = cost.new_ones(cost.shape[0], N, 1)
    for _ in range(iterations):
        u = (N / M) / (kernel @ v)
        v = 1 / (kernel.mT @ u)
    return ((u * kernel * v.mT * cost).sum((1, 2)),)


def sinkhorn_by_normalisation(cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor]:
    """The same as the published Multi-Level-OT code writes it, batched: the plan itself is scaled in every step."""
    cost = wide(cost)
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return ((plan * cost).sum((1, 2)),)


def sinkhorn_in_log_domain(cost: Tensor, epsilon: float, iterations: int) -> tuple[Tensor]:
    """The same by log-sum-exp: any cost and epsilon, 2 exp per element and iteration."""
    cost = wide(cost)
    log_kernel = -cost / epsilon
    g = cost.new_zeros(cost.shape[0], 1, cost.shape[2])
    for _ in range(iterations):
        f = -(log_kernel + g).logsumexp(2, keepdim=True)
        g = -(log_kernel + f).logsumexp(1, keepdim=True)
    return (((log_kernel + f + g).exp() * cost).sum((1, 2)),)


def pot_sinkhorn(cost: Tensor, epsilon: float, iterations: int, *, method: str = "log_sinkhorn") -> tuple[Tensor]:
    """POT's batched solver between uniform marginals, differentiated through its iterations.

    Exactly ``iterations`` are run; all the same POT looks at the marginals in every tenth, and waits for the device.

    Args:
        cost: ``[B, M, N]``.
        method: ``"log_sinkhorn"``, POT's default, or ``"sinkhorn"``, on scaling vectors, which POT 0.9.7 makes on the
            CPU wherever the cost is.

    Returns:
        ``sum(P * C)``, ``[B]``.
    """
    return (_pot(cost, epsilon, iterations, method, "autodiff").value_linear,)


def pot_regularized(cost: Tensor, epsilon: float, iterations: int, *, method: str = "log_sinkhorn") -> tuple[Tensor]:
    """The same solver with its default gradient, the plan (envelope theorem): POT's cheapest backward.

    Returns:
        ``sum(P * C) + epsilon KL(P | a b^T)``, ``[B]``.
    """
    return (_pot(cost, epsilon, iterations, method, "envelope").value,)


def geomloss_regularized(x: Tensor, y: Tensor, epsilon: float, *, scaling: float = 0.5) -> tuple[Tensor]:
    """GeomLoss's Sinkhorn on L1 costs between uniform marginals, with the envelope gradient.

    GeomLoss lowers epsilon step by step, from the features' diameter on, and moves both potentials at once by half a
    step; nobody chooses the number of iterations, which follows from the diameter and ``scaling``. Its value is that of
    a converged problem up to an error that ``scaling`` sets, and its time compares with no fixed number of iterations.

    Args:
        x: ``[B, M, D]``, y: ``[B, N, D]``.
        scaling: ratio of one epsilon to the one before, below 1; the nearer to 1, the longer and the more exact.

    Returns:
        ``sum(P * C) + epsilon KL(P | a b^T)``, ``[B]``.
    """
    geomloss = _installed("geomloss", "GeomLoss")
    loss = geomloss.SamplesLoss(
        "sinkhorn",
        p=1,
        blur=epsilon,
        scaling=scaling,
        debias=False,
        backend="tensorized",
        cost=lambda a, b: torch.cdist(a, b, p=1),  # its own cost for p=1 is the Euclidean distance
    )
    return (loss(wide(x), wide(y)),)


def _pot(cost: Tensor, epsilon: float, iterations: int, method: str, grad: str) -> Any:
    batch = _installed("ot.batch", "POT")
    return batch.solve_batch(
        wide(cost), reg=epsilon, max_iter=iterations, tol=0.0, method=method, reg_type="kl", grad=grad
    )


def _installed(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this baseline needs {name}: pip install 'mlot-kernels[bench]'") from error
