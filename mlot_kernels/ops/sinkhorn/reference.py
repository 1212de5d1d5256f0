"""The definition, in plain torch: what every other backend is held against.

Log-scalings are F = f / epsilon [B, M] and G = g / epsilon [B, N], X = -C / epsilon [B, M, N], P = exp(F + X + G). A
row or column does not count where it lies beyond its problem's length or its marginal is 0; its log-scaling is -inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlot_kernels.checks import accumulator
from mlot_kernels.transport import within

WIDEST_SCALING = 80.0  # range(C) / epsilon up to which "auto" scales: exp(-80) is still a normal float32
ABSORB_BEYOND = {torch.float32: 30.0, torch.float64: 300.0}  # |log u| at which a scaling is taken into the kernel


class Problem(NamedTuple):
    """One batch of problems with what does not count masked out."""

    cost: Tensor  # [B, M, N], 0 where it does not count
    kernel: Tensor  # X, -inf where it does not count
    log_a: Tensor  # [B, M], -inf where it does not count
    log_b: Tensor  # [B, N]
    rows: Tensor  # [B, M] bool, counts
    columns: Tensor  # [B, N]


def problem(
    cost: Tensor,
    row_marginal: Tensor | None,
    column_marginal: Tensor | None,
    row_lengths: Tensor | None,
    column_lengths: Tensor | None,
    epsilon: float,
    marginals: str,
) -> Problem:
    B, M, N = cost.shape
    rows, columns = (within(lengths, B, n, cost.device) for lengths, n in ((row_lengths, M), (column_lengths, N)))
    if row_marginal is not None and column_marginal is not None:
        rows, columns = rows & (row_marginal != 0), columns & (column_marginal != 0)
    rows, columns = rows & columns.any(1, keepdim=True), columns & rows.any(1, keepdim=True)
    counts = rows[:, :, None] & columns[:, None, :]
    wide = accumulator(cost.dtype)
    cost = cost.to(wide).masked_fill(~counts, 0)
    m, n = (side.sum(1, keepdim=True).clamp(min=1).to(wide) for side in (rows, columns))  # [B, 1]
    if row_marginal is not None and column_marginal is not None:
        log_a, log_b = (
            marginal.to(wide).masked_fill(~side, 1).log()
            for marginal, side in ((row_marginal, rows), (column_marginal, columns))
        )
    elif marginals == "uniform":
        log_a, log_b = -m.log().expand(B, M), -n.log().expand(B, N)
    else:  # "unit": a = N / M keeps the scalings from drifting by (M / N)^l; the last step gives the same plan
        log_a, log_b = (n.log() - m.log()).expand(B, M), cost.new_zeros(B, N)
    return Problem(
        cost,
        (-cost / epsilon).masked_fill(~counts, float("-inf")),
        log_a.masked_fill(~rows, float("-inf")),
        log_b.masked_fill(~columns, float("-inf")),
        rows,
        columns,
    )


# The definition, differentiable by autograd: the log-domain loop.


def sinkhorn(
    cost: Tensor,
    row_marginal: Tensor | None,
    column_marginal: Tensor | None,
    row_lengths: Tensor | None,
    column_lengths: Tensor | None,
    column_weight: Tensor | None,
    epsilon: float,
    iterations: int,
    marginals: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Transport cost ``[B]``, regularised cost ``[B]`` and plan ``[B, M, N]`` of exactly ``iterations`` steps."""
    p = problem(cost, row_marginal, column_marginal, row_lengths, column_lengths, epsilon, marginals)
    F, G = torch.zeros_like(p.log_a), torch.zeros_like(p.log_b)
    for _ in range(iterations):
        F = _log_step(p.log_a, p.kernel, G[:, None, :], 2)
        G = _log_step(p.log_b, p.kernel, F[:, :, None], 1)
    return _values(p, F[:, :, None] + p.kernel + G[:, None, :], column_weight, epsilon)


def _log_step(log_marginal: Tensor, kernel: Tensor, other: Tensor, dimension: int) -> Tensor:
    """``log_marginal - logsumexp(kernel + other)``; -inf where the marginal is 0."""
    empty = log_marginal == float("-inf")
    total = (kernel + other).masked_fill(empty.unsqueeze(dimension), 0).logsumexp(dimension)
    return log_marginal - total.masked_fill(empty, 0)


def _values(
    p: Problem, log_plan: Tensor, column_weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    plan = log_plan.exp()
    carried = plan != 0
    moved = torch.where(carried, plan * p.cost.masked_fill(~carried, 0), plan)  # 0 * inf is 0 here; a NaN stays
    regularized = moved.sum((1, 2)) + epsilon * (plan * _surprise(p, log_plan, carried)).sum((1, 2))
    return _weighted(moved, column_weight, p.columns).sum((1, 2)), regularized, plan


def _surprise(p: Problem, log_plan: Tensor, carried: Tensor) -> Tensor:
    """``log(P / (a b^T))``, 0 where nothing is carried."""
    return (log_plan - p.log_a[:, :, None] - p.log_b[:, None, :]).masked_fill(~carried, 0)


def _weighted(moved: Tensor, column_weight: Tensor | None, columns: Tensor) -> Tensor:
    if column_weight is None:
        return moved
    return moved * column_weight.to(moved.dtype).masked_fill(~columns, 0)[:, None, :]


# The explicit forward and backward: what a kernel computes, step by step.


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
    p = problem(cost, row_marginal, column_marginal, row_lengths, column_lengths, epsilon, marginals)
    solved = []
    if domain in ("auto", "log"):
        solved.append(_solve_log(p, iterations, tolerance))
    if domain in ("auto", "scaling"):
        solved.append(_solve_scaling(p, iterations, tolerance))
    if domain == "auto":
        scales = prefers_scaling(p, epsilon)
        rows, columns, done = (
            torch.where(scales.view(-1, *[1] * (x.dim() - 1)), y, x) for x, y in zip(*solved, strict=True)
        )
    else:
        rows, columns, done = solved[0]
    F, G = rows[:, -1], columns[:, -1]
    transported, regularized, plan = _values(p, _log_plan(p, F), column_weight, epsilon)
    kept = gradient == "unrolled"
    return (
        transported,
        regularized,
        plan if return_plan else plan.new_empty(0),
        (epsilon * F).masked_fill(~p.rows, 0),
        (epsilon * G).masked_fill(~p.columns, 0),
        done,
        rows.masked_fill(~p.rows[:, None], 0) if kept else rows.new_empty(rows.shape[0], 0, rows.shape[2]),
        columns.masked_fill(~p.columns[:, None], 0)
        if kept
        else columns.new_empty(columns.shape[0], 0, columns.shape[2]),
    )


def _log_plan(p: Problem, F: Tensor) -> Tensor:
    """log P after a column step: ``log b`` and a log-softmax, which keeps column sums exact however large F is."""
    return p.log_b[:, None, :] + _log_softmax(p.kernel + F[:, :, None], 1)


def _log_softmax(x: Tensor, dimension: int) -> Tensor:
    """-inf where a whole column or row is -inf."""
    nothing = (x == float("-inf")).all(dimension, keepdim=True)
    return x.masked_fill(nothing, 0).log_softmax(dimension).masked_fill(nothing, float("-inf"))


def prefers_scaling(p: Problem, epsilon: float) -> Tensor:
    """``[B]`` bool: ``domain="auto"`` works on scalings where the kernel's range cannot underflow."""
    finite = (p.kernel > float("-inf")) & ~p.kernel.isnan()
    if finite.shape[1] == 0 or finite.shape[2] == 0:
        return finite.new_ones(finite.shape[0])
    highest = p.cost.masked_fill(~finite, float("-inf")).amax((1, 2))
    lowest = p.cost.masked_fill(~finite, float("inf")).amin((1, 2))
    return (highest - lowest <= WIDEST_SCALING * epsilon) & ~p.cost.isnan().any(2).any(1)


def _solve_log(p: Problem, iterations: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-scalings after each step, ``[B, L, M]`` and ``[B, L, N]``, and how many steps each problem took ``[B]``."""
    F, G = torch.zeros_like(p.log_a), torch.zeros_like(p.log_b)
    history = _History(p, tolerance)
    for _ in range(iterations):
        F_next = _log_step(p.log_a, p.kernel, G[:, None, :], 2)
        F, G = history.add(F_next, _log_step(p.log_b, p.kernel, F_next[:, :, None], 1), F, G)
    return history.result()


def _solve_scaling(p: Problem, iterations: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same on scalings: one exp per element and absorption, then two products with the kernel per step.

    Step 1 runs in the log domain. From then on a step moves a log-scaling by at most log(1 / smallest marginal), so
    that a scaling can be taken into the kernel, by exp of the log-scalings so far, before it leaves the range of its
    dtype.
    """
    beyond = ABSORB_BEYOND[p.cost.dtype]
    a, b = p.log_a.exp(), p.log_b.exp()
    history = _History(p, tolerance)
    F = _log_step(p.log_a, p.kernel, torch.zeros_like(p.log_b)[:, None, :], 2)
    F, G = history.add(F, _log_step(p.log_b, p.kernel, F[:, :, None], 1), F, torch.zeros_like(p.log_b))
    F_absorbed, G_absorbed = F, G
    kernel = (F[:, :, None] + p.kernel + G[:, None, :]).exp()
    u, v = torch.ones_like(a), torch.ones_like(b)
    for _ in range(1, iterations):
        u = _divide(a, (kernel * v[:, None, :]).sum(2))  # not matmul, which may run in TF32
        v = _divide(b, (kernel * u[:, :, None]).sum(1))
        F, G = history.add(F_absorbed + u.log(), G_absorbed + v.log(), F, G)
        absorb = (_furthest(u, a) > beyond) | (_furthest(v, b) > beyond)  # [B, 1]
        F_absorbed, G_absorbed = torch.where(absorb, F, F_absorbed), torch.where(absorb, G, G_absorbed)
        rebuilt = (F[:, :, None] + p.kernel + G[:, None, :]).exp()
        kernel = torch.where(absorb[:, :, None], rebuilt, kernel)
        u, v = torch.where(absorb, 1, u), torch.where(absorb, 1, v)
    return history.result()


def _divide(marginal: Tensor, total: Tensor) -> Tensor:
    return torch.where(marginal == 0, 0, marginal / total)


def _furthest(scaling: Tensor, marginal: Tensor) -> Tensor:
    """``[B, 1]``, the largest |log scaling| among those whose marginal is not 0."""
    if scaling.shape[1] == 0:
        return scaling.new_zeros(scaling.shape[0], 1)
    return scaling.masked_fill(marginal == 0, 1).log().abs().amax(1, keepdim=True)


class _History:
    """Collects log-scalings; a problem that has converged keeps its own."""

    def __init__(self, p: Problem, tolerance: float) -> None:
        self.tolerance = tolerance
        self.counts = p.columns
        self.rows: list[Tensor] = []
        self.columns: list[Tensor] = []
        self.done = p.cost.new_zeros(p.cost.shape[0], 1, dtype=torch.bool)
        self.steps = p.cost.new_zeros(p.cost.shape[0], dtype=torch.int64)

    def add(self, F: Tensor, G: Tensor, F_before: Tensor, G_before: Tensor) -> tuple[Tensor, Tensor]:
        F, G = torch.where(self.done, F_before, F), torch.where(self.done, G_before, G)
        self.steps = self.steps + ~self.done[:, 0]
        if self.tolerance > 0:
            moved = (G - G_before).abs().masked_fill(~self.counts, 0)
            self.done = self.done | (moved <= self.tolerance).all(1, keepdim=True)
        self.rows.append(F)
        self.columns.append(G)
        return F, G

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.stack(self.rows, 1), torch.stack(self.columns, 1), self.steps


def backward(
    grad_cost: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the cost, the two marginals and the column weight, all in the accumulator's dtype.

    Of the options that say how the steps were made, the histories here need none.

    ``gradient``: ``"unrolled"``, the exact adjoint of the steps taken; ``"implicit"``, of the fixed point;
    ``"envelope"``, ``dregularized/dC = P``.
    """
    p = problem(cost, row_marginal, column_marginal, row_lengths, column_lengths, epsilon, marginals)
    F = row_history[:, -1] if gradient == "unrolled" else row_potential / epsilon
    log_plan = _log_plan(p, F.masked_fill(~p.rows, float("-inf")))
    plan = log_plan.exp()
    carried = plan != 0
    finite_cost = p.cost.masked_fill(~carried, 0)
    grad_cost, grad_regularized = grad_cost[:, None, None], grad_regularized[:, None, None]
    grad_weight = (grad_cost * plan * finite_cost).sum(1)
    no_marginals = torch.zeros_like(p.log_a), torch.zeros_like(p.log_b)
    if gradient == "envelope":
        return grad_regularized * plan, *no_marginals, torch.zeros_like(grad_weight)

    weight = torch.ones_like(p.log_b)
    if column_weight is not None:
        weight = column_weight.to(weight.dtype).masked_fill(~p.columns, 0)
    direct = plan * (grad_cost * weight[:, None, :] + grad_regularized)
    surprise = _surprise(p, log_plan, carried)
    W = grad_cost * weight[:, None, :] * finite_cost + grad_regularized * (finite_cost + epsilon * (surprise + 1))
    if return_plan:
        W = W + grad_plan
    S = torch.where(carried, W * plan, 0 * plan)
    if gradient == "implicit":
        x, y = _implicit(S, plan)
        return direct - (S - plan * (x[:, :, None] + y[:, None, :])) / epsilon, *no_marginals, grad_weight

    X_bar, log_a_bar, log_b_bar = _unrolled(S, p, row_history, column_history, done)
    # KL's own dependence on the marginals, beside that through the plan
    log_a_bar = log_a_bar - epsilon * (grad_regularized * plan).sum(2)
    log_b_bar = log_b_bar - epsilon * (grad_regularized * plan).sum(1)
    return (
        direct - X_bar / epsilon,
        _divide_marginal(log_a_bar, p.log_a),
        _divide_marginal(log_b_bar, p.log_b),
        grad_weight,
    )


def _divide_marginal(log_bar: Tensor, log_marginal: Tensor) -> Tensor:
    empty = log_marginal == float("-inf")
    return (log_bar * (-log_marginal.masked_fill(empty, 0)).exp()).masked_fill(empty, 0)


def _unrolled(
    S: Tensor, p: Problem, row_history: Tensor, column_history: Tensor, done: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoints of X, log a and log b by the steps in reverse; each problem starts at the last step it took.

    With Q_l = exp(F_l + X + G_l) / b and R_l = exp(F_l + X + G_(l-1)) / a, from G_bar = S^T 1 on:
    ``F_bar = [l is the last] S 1 - Q_l G_bar``, ``G_bar <- -R_l^T F_bar``, ``X_bar -= Q_l diag(G_bar) + diag(F_bar)
    R_l``. A step makes Q's columns and R's rows sum to 1: as softmaxes of X + F_l and of X + G_(l-1) they do so to
    rounding, where exp of the sum would carry the rounding of log-scalings as large as range(C) / epsilon.
    """
    X_bar, G_bar = S, S.sum(1)
    log_a_bar, log_b_bar = torch.zeros_like(p.log_a), torch.zeros_like(p.log_b)
    for step in range(row_history.shape[1], 0, -1):
        taken, last = (done >= step)[:, None], (done == step)[:, None]
        F = row_history[:, step - 1].masked_fill(~p.rows, float("-inf"))
        G_before = column_history[:, step - 2] if step > 1 else torch.zeros_like(G_bar)
        Q = _log_softmax(p.kernel + F[:, :, None], 1).exp()
        R = _log_softmax(p.kernel + G_before[:, None, :], 2).exp()
        G_bar_now = torch.where(taken, G_bar, 0)
        F_bar = torch.where(last, S.sum(2), 0) - (Q * G_bar_now[:, None, :]).sum(2)
        X_bar = X_bar - Q * G_bar_now[:, None, :] - F_bar[:, :, None] * R
        log_a_bar, log_b_bar = log_a_bar + F_bar, log_b_bar + G_bar_now
        G_bar = torch.where(taken, -(F_bar[:, :, None] * R).sum(1), G_bar)
    return X_bar, log_a_bar, log_b_bar


def _implicit(S: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``[diag(P 1), P; P^T, diag(P^T 1)] (x, y) = (S 1, S^T 1)`` for the y orthogonal to the marginal."""
    dtype = plan.dtype
    S, plan = S.double(), plan.double()  # the system is ill-conditioned
    r, c = plan.sum(2), plan.sum(1)
    inverse = torch.where(r == 0, 0, 1 / r)[:, :, None]
    schur = torch.diag_embed(c) - plan.mT @ (inverse * plan)
    # Singular along 1; c c^T / sum(c) fixes that direction at 0, a 1 on the diagonal each column without mass.
    schur = schur + c[:, :, None] * c[:, None, :] / c.sum(1).clamp(min=torch.finfo(c.dtype).tiny)[:, None, None]
    schur = schur + torch.diag_embed((c == 0).to(c.dtype))
    right = S.sum(1) - ((inverse * plan).mT @ S.sum(2)[:, :, None]).squeeze(2)
    y = torch.linalg.solve_ex(schur, right)[0]
    x = inverse.squeeze(2) * (S.sum(2) - (plan @ y[:, :, None]).squeeze(2))
    return x.to(dtype), y.to(dtype)
