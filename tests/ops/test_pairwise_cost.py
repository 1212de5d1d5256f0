import pytest
import torch

from mlot_kernels import pairwise_cost
from mlot_kernels.ops.pairwise_cost import reference


@pytest.mark.parametrize(
    ("metric", "scipys"),
    [("l1", "cityblock"), ("l2", "euclidean"), ("sqeuclidean", "sqeuclidean"), ("cosine", "cosine")],
)
def test_equals_scipy(metric, scipys):
    distance = pytest.importorskip("scipy.spatial.distance", reason="SciPy is the oracle here")
    x, y = torch.randn(2, 6, 9, dtype=torch.float64), torch.randn(2, 4, 9, dtype=torch.float64)
    expected = [distance.cdist(a, b, scipys) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    for b in range(2):
        torch.testing.assert_close(pairwise_cost(x, y, metric=metric)[b], torch.tensor(expected[b]))


@pytest.mark.parametrize(("metric", "p"), [("l1", 1.0), ("l2", 2.0)])
def test_gradient_equals_torchs_cdist_at_ties_too(metric, p):
    x, y = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    x[0, 1], x[1, 2, 3] = y[0, 3], y[1, 0, 3]
    grads = []
    for function in (lambda a, b: pairwise_cost(a, b, metric=metric), lambda a, b: torch.cdist(a, b, p=p)):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        (function(a, b) * torch.arange(60.0).view(2, 5, 6)).sum().backward()
        grads.append((a.grad, b.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_cross_entropy_is_torchs():
    x, y = torch.randn(1, 3, 7).softmax(-1), torch.randn(1, 4, 7).softmax(-1)
    x[0, 0, 2] = y[0, 1, 2] = 0
    x[0, 1:, 2], x[0, 0] = 0, x[0, 0] / x[0, 0].sum()
    expected = -torch.special.xlogy(x[:, :, None], y[:, None]).sum(-1)
    torch.testing.assert_close(pairwise_cost(x, y, metric="cross_entropy"), expected)
    assert expected.isfinite().all()


def test_an_infinite_cost_that_nothing_needs_passes_no_gradient():
    x = torch.tensor([[[0.5, 0.5]]], requires_grad=True)
    y = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], requires_grad=True)
    cost = pairwise_cost(x, y, metric="cross_entropy")
    assert cost[0, 0, 0] == float("inf")
    cost[0, 0, 1].backward()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


def test_a_side_that_needs_no_gradient_gets_none():
    x, y = torch.randn(1, 2, 3), torch.randn(1, 4, 3, requires_grad=True)
    pairwise_cost(x, y).sum().backward()
    assert x.grad is None
    assert y.grad is not None


def test_the_two_sides_may_differ_in_dtype():
    x, y = torch.randn(1, 2, 3, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 4, 3, dtype=torch.float64)
    cost = pairwise_cost(x, y)
    cost.sum().backward()
    assert (cost.dtype, x.grad.dtype) == (torch.float64, torch.bfloat16)


def test_tiles_change_nothing(monkeypatch):
    x, y = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    grad = torch.randn(2, 7, 3, dtype=torch.float64)
    whole = reference.forward(x, y, "l2"), *reference.backward(grad, x, y, "l2", True, True)
    monkeypatch.setattr(reference, "_TILE", 2 * 2 * 3 * 5)
    tiled = reference.forward(x, y, "l2"), *reference.backward(grad, x, y, "l2", True, True)
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b)


X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pairwise_cost(X, X, metric="l3"), ValueError, "metric must be one of 'l1', 'l2'.*got 'l3'"),
        (
            lambda: pairwise_cost(X, X[..., :3]),
            ValueError,
            r"y must be \[B, N, D\] with B and D of x",
        ),
        (lambda: pairwise_cost(X, X[:1]), ValueError, "y must be"),
        (lambda: pairwise_cost(X[0], X), ValueError, r"x must be \[B, M, D\], got \(3, 4\)"),
        (lambda: pairwise_cost(X.long(), X), TypeError, "x must be one of .*got torch.int64"),
        (lambda: pairwise_cost(X, X.to("meta")), ValueError, "x on cpu, y on meta"),
        (lambda: pairwise_cost(X, None), TypeError, "y must be a tensor"),
        (lambda: pairwise_cost(X, X, p=1), TypeError, "p"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
