import pytest
import torch

from mlot_kernels import pairwise_cost, sinkhorn, transport_cost
from mlot_kernels.transport import METRICS


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_is_sinkhorn_on_the_pairwise_cost(metric, gradient):
    x, y = (torch.rand(2, n, 6, dtype=torch.float64) + 0.1 for n in (5, 4))
    options = {"gradient": gradient, "epsilon": 0.5, "row_lengths": torch.tensor([5, 2]), "iterations": 9}
    results = []
    for fused in (True, False):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        if fused:
            solved = transport_cost(*leaves, metric=metric, **options)
        else:
            solved = sinkhorn(pairwise_cost(*leaves, metric=metric), **options)
        total = solved.regularized_cost.sum() + (0 if gradient == "envelope" else solved.cost.sum())
        total.backward()
        results.append([*solved[:2], *solved[3:], leaves[0].grad, leaves[1].grad])
    for fused, apart in zip(*results, strict=True):
        torch.testing.assert_close(fused, apart)


def test_there_is_no_plan():
    assert transport_cost(torch.rand(1, 2, 3), torch.rand(1, 2, 3)).plan is None


def test_a_side_that_needs_no_gradient_gets_none():
    x, y = torch.rand(1, 2, 3), torch.rand(1, 4, 3, requires_grad=True)
    transport_cost(x, y).cost.sum().backward()
    assert x.grad is None
    assert y.grad is not None


X, Y = torch.rand(2, 3, 4), torch.rand(2, 5, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: transport_cost(X, Y, metric="l3"), ValueError, "metric must be one of"),
        (lambda: transport_cost(X, Y[:1]), ValueError, r"y must be \[B, N, D\] with B and D of x"),
        (lambda: transport_cost(X[0], Y), ValueError, r"x must be \[B, M, D\], got \(3, 4\)"),
        (lambda: transport_cost(X, Y.to("meta")), ValueError, "x on cpu, y on meta"),
        (lambda: transport_cost(X, Y, epsilon=-1), ValueError, "epsilon must be above 0"),
        (lambda: transport_cost(X, Y, row_lengths=torch.ones(3).long()), ValueError, r"row_lengths must be \[B\] of x"),
        (lambda: transport_cost(X, Y, return_plan=True), TypeError, "return_plan"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
