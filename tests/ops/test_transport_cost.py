import pytest
import torch

from mlot_kernels import native, pairwise_cost, sinkhorn, transport_cost
from mlot_kernels.transport import METRICS

needs_cpu = pytest.mark.skipif(native.MISSING["cpu"] is not None, reason=native.MISSING["cpu"] or "")
by_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])


@by_backend
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_is_sinkhorn_on_the_pairwise_cost(backend, metric, gradient):
    x, y = (torch.rand(2, n, 6, dtype=torch.float64) + 0.1 for n in (5, 4))
    options = {"gradient": gradient, "epsilon": 0.5, "row_lengths": torch.tensor([5, 2]), "iterations": 9}
    results = []
    for fused in (True, False):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        if fused:
            solved = transport_cost(*leaves, metric=metric, backend=backend, **options)
        else:
            solved = sinkhorn(pairwise_cost(*leaves, metric=metric), backend="reference", **options)
        total = solved.regularized_cost.sum() + (0 if gradient == "envelope" else solved.cost.sum())
        total.backward()
        results.append([*solved[:2], *solved[3:], leaves[0].grad, leaves[1].grad])
    for fused, apart in zip(*results, strict=True):
        torch.testing.assert_close(fused, apart)


def _solved(backend, x, y, **options):
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    solved = transport_cost(*leaves, backend=backend, **options)
    (solved.cost.sum() + 0.5 * solved.regularized_cost.sum()).backward()
    return [*(value.detach() for value in (*solved[:2], *solved[3:])), leaves[0].grad, leaves[1].grad]


@needs_cpu
@pytest.mark.parametrize("metric", METRICS)
def test_cpu_equals_the_reference_beyond_the_size_of_cases(metric):
    x, y = (torch.rand(2, n, 37, dtype=torch.float64) + 0.1 for n in (150, 70))
    a, b = (torch.rand(2, n, dtype=torch.float64) for n in (150, 70))
    a[0, 5] = b[1, 7] = 0  # rows that do not count between rows that do
    a, b = (m / m.sum(1, keepdim=True) for m in (a, b))
    x[0, 5] = y[1, 7] = float("nan")
    options = {"metric": metric, "epsilon": 1.0, "iterations": 9, "marginals": (a, b)}
    for ours, truth in zip(*(_solved(backend, x, y, **options) for backend in ("cpu", "reference")), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


@needs_cpu
@pytest.mark.parametrize(("for_x", "for_y"), [("bfloat16", "float32"), ("float32", "float64"), ("float16", "bfloat16")])
def test_cpu_takes_sides_of_different_dtypes(for_x, for_y):
    x, y = torch.rand(2, 5, 6).to(getattr(torch, for_x)), torch.rand(2, 7, 6).to(getattr(torch, for_y))
    for ours, truth in zip(*(_solved(backend, x, y) for backend in ("cpu", "reference")), strict=True):
        assert ours.dtype == truth.dtype
        torch.testing.assert_close(ours, truth, rtol=2e-2, atol=1e-4)


@needs_cpu
def test_threads_change_no_bit_within_one_large_problem():
    x, y = torch.rand(1, 530, 9), torch.rand(1, 515, 9)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_solved("cpu", x, y, iterations=3))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@by_backend
def test_features_of_width_0_cost_nothing(backend):
    x, y = torch.rand(2, 3, 0), torch.rand(2, 4, 0)
    assert _solved(backend, x, y)[0].tolist() == [0, 0]


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
