import pytest
import torch

from mlot_kernels import BackendUnavailable, pairwise_cost, sinkhorn, transport_cost
from mlot_kernels.transport import METRICS
from tests.conftest import backends_of
from tests.dispatch_modes import Allocations

BACKENDS = backends_of("transport_cost")
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_kernels = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels are not built")
needs_cuda = pytest.mark.skipif("cuda" not in BACKENDS, reason="tests/native/test_cuda_on_host.py runs it")
GRADIENTS = ("unrolled", "envelope", "implicit")
RUNS = [(metric, name) for metric in METRICS for name in BACKENDS if metric == "l1" or name != "cuda"]


@pytest.mark.parametrize(
    ("metric", "backend", "gradient"),
    [(*run, kind) for run in RUNS for kind in GRADIENTS if kind != "implicit" or run[1] not in ("triton", "cuda")],
)
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


@pytest.mark.parametrize(("metric", "backend"), [run for run in RUNS if run[1] != "reference"])
def test_kernels_equal_the_reference_beyond_the_size_of_cases(backend, metric):
    x, y = (torch.rand(2, n, 37, dtype=torch.float64) + 0.1 for n in (150, 70))
    a, b = (torch.rand(2, n, dtype=torch.float64) for n in (150, 70))
    a[0, 5] = b[1, 7] = 0  # rows that do not count between rows that do
    a, b = (m / m.sum(1, keepdim=True) for m in (a, b))
    x[0, 5] = y[1, 7] = float("nan")
    options = {"metric": metric, "epsilon": 1.0, "iterations": 9, "marginals": (a, b)}
    for ours, truth in zip(*(_solved(backend, x, y, **options) for backend in (backend, "reference")), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


@by_kernels
@pytest.mark.parametrize(("for_x", "for_y"), [("bfloat16", "float32"), ("float32", "float64"), ("float16", "bfloat16")])
def test_kernels_take_sides_of_different_dtypes(backend, for_x, for_y):
    x, y = torch.rand(2, 5, 6).to(getattr(torch, for_x)), torch.rand(2, 7, 6).to(getattr(torch, for_y))
    for ours, truth in zip(*(_solved(backend, x, y) for backend in (backend, "reference")), strict=True):
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


@by_kernels
def test_costs_stand_in_scratch_a_few_problems_at_a_time(backend, monkeypatch):
    x, y = torch.rand(9, 20, 6), torch.rand(9, 30, 6)
    lengths = {"row_lengths": torch.arange(9) + 8, "column_lengths": 30 - torch.arange(9)}
    weight = torch.rand(9, 30)
    whole = _solved(backend, x, y, iterations=3, column_weight=weight, **lengths)
    if backend == "triton":
        from mlot_kernels.ops.transport_cost import triton_kernels

        monkeypatch.setattr(triton_kernels, "SCRATCH", 2 * 20 * 30)
    with Allocations() as meter:
        forward = torch.ops.mlot.transport_cost_forward
        outputs = forward(
            x, y, None, None, *lengths.values(), weight, "l1", 0.1, 3, "uniform", 0.0, "auto", "unrolled", backend
        )
    meter.keep(outputs)
    assert meter.peak - meter.kept < 4 * 9 * 20 * 30
    for parted, together in zip(
        _solved(backend, x, y, iterations=3, column_weight=weight, **lengths), whole, strict=True
    ):
        assert torch.equal(parted, together)


@pytest.mark.parametrize("backend", [name for name in ("triton", "cuda") if name in BACKENDS])
def test_gpus_refuse_the_implicit_gradient(backend):
    with pytest.raises(
        BackendUnavailable, match=rf"transport_cost: backend '{backend}': it has no gradient='implicit'"
    ):
        transport_cost(torch.rand(1, 3, 2), torch.rand(1, 4, 2), gradient="implicit", backend=backend)


@needs_cuda
@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "l1"])
def test_cuda_refuses_other_metrics(metric):
    with pytest.raises(BackendUnavailable, match=r"transport_cost: backend 'cuda': it has metric='l1' alone; pass"):
        transport_cost(torch.rand(1, 3, 2), torch.rand(1, 4, 2), metric=metric, backend="cuda")


@needs_cuda
@pytest.mark.parametrize("gradient", ["unrolled", "envelope"])
@pytest.mark.parametrize("shared", [12000, 8000, 0], ids=["costs apart", "few rows at a time", "no workspace on chip"])
def test_cuda_equals_the_reference_beyond_shared_memory(shared, gradient, monkeypatch):
    monkeypatch.setenv("MLOT_ON_HOST_CLUSTER", "2")
    monkeypatch.setenv("MLOT_ON_HOST_THREADS", "32")
    monkeypatch.setenv("MLOT_ON_HOST_SHARED", str(shared))
    x, y = (torch.rand(3, n, 37, dtype=torch.float64) for n in (50, 30))
    x[:, 2, :20] = y[:, 3, :20]  # ties
    x[1, 41:] = y[2, 7:] = float("nan")
    lengths = {"row_lengths": torch.tensor([50, 41, 50]), "column_lengths": torch.tensor([30, 30, 7])}
    found = []
    for backend in ("cuda", "reference"):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        solved = transport_cost(*leaves, epsilon=0.5, iterations=7, gradient=gradient, backend=backend, **lengths)
        solved.regularized_cost.sum().backward()
        found.append([*(value.detach() for value in (*solved[:2], *solved[3:])), leaves[0].grad, leaves[1].grad])
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


def test_there_is_no_plan():
    assert transport_cost(torch.rand(1, 2, 3), torch.rand(1, 2, 3)).plan is None


@by_backend
def test_a_side_that_needs_no_gradient_gets_none(backend):
    x, y = torch.rand(1, 2, 3), torch.rand(1, 4, 3, requires_grad=True)
    transport_cost(x, y, backend=backend).cost.sum().backward()
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
