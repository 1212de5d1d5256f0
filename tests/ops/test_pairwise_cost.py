import pytest
import torch

from mlot_kernels import BackendUnavailable, pairwise_cost, use_backend
from mlot_kernels.ops.pairwise_cost import reference
from mlot_kernels.transport import METRICS
from tests.conftest import backends_of

BACKENDS = backends_of("pairwise_cost")
ALL_METRICS = [name for name in BACKENDS if name != "cuda"]  # which has l1 alone: test_cuda_refuses_what_equals_no_l1
RUNS = [(metric, name) for metric in METRICS for name in BACKENDS if metric == "l1" or name in ALL_METRICS]
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library is missing")
needs_cuda = pytest.mark.skipif("cuda" not in BACKENDS, reason="tests/native/test_cuda_on_host.py runs it")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


of_all_runs = pytest.mark.parametrize(("metric", "backend"), RUNS, indirect=["backend"])
of_all_metrics = pytest.mark.parametrize("backend", ALL_METRICS, indirect=True)
SCIPYS = {"l1": "cityblock", "l2": "euclidean", "sqeuclidean": "sqeuclidean", "cosine": "cosine"}


def gradients(x, y, grad, **options):
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    cost = pairwise_cost(x, y, **options)
    return cost.detach(), *torch.autograd.grad(cost, (x, y), grad)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(6, 4, 9), (1, 1, 1), (5, 33, 1), (1, 17, 64), (9, 16, 65), (37, 47, 130)], ids=str)
@pytest.mark.parametrize(("metric", "backend"), [run for run in RUNS if run[0] in SCIPYS], indirect=["backend"])
def test_equals_scipy(metric, sizes, dtype):
    distance = pytest.importorskip("scipy.spatial.distance", reason="SciPy is the oracle here")
    M, N, D = sizes
    x, y = torch.randn(2, M, D).to(dtype), torch.randn(2, N, D).to(dtype)
    cost = pairwise_cost(x, y, metric=metric)
    for b in range(2):
        expected = torch.tensor(distance.cdist(x[b].double().numpy(), y[b].double().numpy(), SCIPYS[metric]))
        torch.testing.assert_close(cost[b], expected.to(cost.dtype), atol=2e-6, rtol=1e-6)


# Whole panels and slabs, and one more or less of each; 300 rows are several slabs, and 4096 features many partial sums.
@needs_cpu
@pytest.mark.parametrize("sizes", [(32, 16, 16), (33, 17, 17), (31, 15, 15), (300, 5, 8), (3, 70, 4096)], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_odd_sizes_equal_the_definition(metric, sizes):
    M, N, D = sizes
    x, y = ((torch.rand(2, rows, D) + 0.05).double() for rows in (M, N))
    grad = torch.randn(2, M, N, dtype=torch.float64)
    expected = gradients(x, y, grad, metric=metric, backend="reference")
    for ours, theirs in zip(gradients(x, y, grad, metric=metric, backend="cpu"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    found = gradients(x.float(), y.float(), grad.float(), metric=metric, backend="cpu")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=4e-6 * float(theirs.abs().max()))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sizes", [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 4, 5)], ids=str)
@of_all_runs
def test_empty_dimensions(metric, sizes):
    B, M, N, D = sizes
    x, y = torch.full((B, M, D), float("nan")), torch.full((B, N, D), float("nan"))
    cost, *found = gradients(x, y, torch.ones(B, M, N), metric=metric)
    assert cost.shape == (B, M, N)
    assert (cost == (1 if metric == "cosine" else 0)).all()  # no features: an empty sum
    for x_or_y, gradient in zip((x, y), found, strict=True):
        assert gradient.shape == x_or_y.shape
        assert (gradient == 0).all()


@needs_cpu
@pytest.mark.parametrize("problems", [1, 2, 5])
@pytest.mark.parametrize("metric", METRICS)
def test_threads_and_batch_mates_change_no_bit(metric, problems):
    x, y = torch.rand(problems, 150, 19), torch.rand(problems, 41, 19)
    grad = torch.randn(problems, 150, 41)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(x, y, grad, metric=metric, backend="cpu"))
            alone = gradients(x[:1], y[:1], grad[:1], metric=metric, backend="cpu")
            results.append(tuple(torch.cat((part, whole[1:])) for part, whole in zip(alone, results[-1], strict=True)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@needs_cpu
@pytest.mark.parametrize("metric", METRICS)
def test_strides_change_no_bit(metric):
    x, y, grad = torch.rand(2, 9, 21), torch.rand(2, 13, 21), torch.randn(2, 9, 13)
    expected = gradients(x, y, grad, metric=metric, backend="cpu")
    wide = torch.rand(2, 9, 50)
    wide[..., 3:45:2] = x
    views = wide[..., 3:45:2], y.mT.contiguous().mT
    cost = pairwise_cost(*views, metric=metric, backend="cpu")
    found = torch.ops.mlot_cpu.pairwise_cost_backward(grad, *views, metric, True, True)
    for ours, theirs in zip((cost, *found), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, 1e-30])
@pytest.mark.parametrize("side", [0, 1])
@of_all_runs
def test_special_values_are_the_definitions(metric, side, value):
    sides = [torch.rand(1, 6, 11) + 0.05, torch.rand(1, 18, 11) + 0.05]
    sides[side][0, 2, 3] = value
    sides[1][0, 4] = sides[0][0, 5]  # a tie in all features
    sides[1][0, 7, 3] = sides[0][0, 2, 3]
    grad = torch.randn(1, 6, 18)
    grad[0, 1, 5], grad[0, 5, 4] = 0, 3
    expected = gradients(*sides, grad, metric=metric, backend="reference")
    for ours, theirs in zip(gradients(*sides, grad, metric=metric), expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


# Whole tiles and chunks of the CUDA kernels and one more or less of each, parts of the other side's rows, features that
# fill no whole vector, and fewer rows or features than a thread has room for.
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(65, 63, 50), (3, 200, 7), (200, 3, 4), (33, 32, 64), (31, 65, 66), (2, 5, 129), (300, 70, 1), (70, 1, 200)]
    + [(8200, 70, 2)],  # parts of several chunks each
    ids=str,
)
def test_a_cuda_tile_equals_the_definition(sizes, dtype):
    M, N, D = sizes
    x, y = (torch.randn(2, rows, D).to(dtype) for rows in (M, N))
    y[:, 0] = x[:, 0]  # ties
    wide = torch.promote_types(dtype, torch.float32)
    grad = torch.randn(2, M, N, dtype=wide)
    found = gradients(x, y, grad, backend="cuda")
    expected = gradients(x.double(), y.double(), grad.double(), backend="reference")
    for ours, theirs in zip(found, expected, strict=True):
        of_sums = 8 * torch.finfo(wide).eps * float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(ours.dtype).eps, atol=of_sums)
    for ours, in_batch in zip(gradients(x[1:], y[1:], grad[1:], backend="cuda"), found, strict=True):
        assert torch.equal(ours, in_batch[1:])


# Rows that begin at any element, features that are not neighbours, and rows in another order.
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_strided_side_equals_a_dense_one_on_cuda(dtype):
    x, y = torch.randn(2, 9, 21).to(dtype), torch.randn(2, 13, 21).to(dtype)
    grad = torch.randn(2, 9, 13, dtype=torch.promote_types(dtype, torch.float32))
    expected = gradients(x, y, grad, backend="cuda")
    wide = torch.full((2, 9, 50), float("nan"), dtype=dtype)
    wide[..., 3:45:2] = x
    shifted = torch.full((2, 13, 24), float("nan"), dtype=dtype)
    shifted[..., 1:22] = y
    for views in ((wide[..., 3:45:2], shifted[..., 1:22]), (x.mT.contiguous().mT, y.flip(1).contiguous().flip(1))):
        cost = pairwise_cost(*views, backend="cuda")
        found = torch.ops.mlot_cuda.pairwise_cost_backward(grad, *views, "l1", True, True)
        for ours, theirs in zip((cost, *found), expected, strict=True):
            assert torch.equal(ours, theirs)


# Where a feature or a weight is not finite a chunk goes another way; all other sums must be what they were.
@needs_cuda
def test_a_sum_on_cuda_equals_what_it_was_beside_one_that_is_not_finite():
    x, y, grad = torch.randn(1, 40, 70), torch.randn(1, 100, 70), torch.randn(1, 40, 100)
    y[0, 3] = x[0, 5]
    expected = gradients(x, y, grad, backend="cuda")
    poisoned = x.clone(), y.clone()
    poisoned[0][0, 7, 2] = poisoned[1][0, 50, 9] = float("inf")
    cost, for_x, for_y = gradients(*poisoned, grad, backend="cuda")
    for ours, theirs in zip((for_x, for_y), expected[1:], strict=True):
        rest = [d for d in range(70) if d not in (2, 9)]
        assert torch.equal(ours[..., rest], theirs[..., rest])
    assert cost[0, 7].isinf().all()
    assert cost[0, :, 50].isinf().all()


@needs_cuda
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_equals_the_definitions_at_ties_on_cuda(value):
    x, y, grad = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(1, 2, 2)
    grad[0, 0, 1] = value
    expected = gradients(x, y, grad, backend="reference")
    for ours, theirs in zip(gradients(x, y, grad, backend="cuda"), expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@needs_cuda
@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "l1"])
def test_cuda_refuses_what_equals_no_l1(metric):
    with pytest.raises(BackendUnavailable, match=r"pairwise_cost: backend 'cuda': it has metric='l1' alone; pass"):
        pairwise_cost(torch.rand(1, 3, 2), torch.rand(1, 4, 2), metric=metric, backend="cuda")


@pytest.mark.usefixtures("backend")
def test_the_sign_of_a_difference_below_the_normal_numbers():
    x, y = torch.tensor([[[1e-40, 0.0, -0.0]]]), torch.tensor([[[0.0, 1e-40, 0.0]]])
    _, for_x, for_y = gradients(x, y, torch.ones(1, 1, 1), metric="l1")
    assert for_x.tolist() == [[[1, -1, 0]]]
    assert for_y.tolist() == [[[-1, 1, 0]]]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("metric", "backend"), [run for run in RUNS if run[0] in ("l1", "l2")], indirect=["backend"])
def test_gradient_equals_torchs_cdist_at_ties_too(metric):
    x, y = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    x[0, 1], x[1, 2, 3] = y[0, 3], y[1, 0, 3]
    grads = []
    for function in (lambda a, b: pairwise_cost(a, b, metric=metric), lambda a, b: torch.cdist(a, b, p=int(metric[1]))):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        (function(a, b) * torch.arange(60.0).view(2, 5, 6)).sum().backward()
        grads.append((a.grad, b.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@of_all_metrics
@pytest.mark.usefixtures("backend")
def test_cross_entropy_is_torchs():
    x, y = torch.randn(1, 3, 7).softmax(-1), torch.randn(1, 4, 7).softmax(-1)
    x[0, 0, 2] = y[0, 1, 2] = 0
    x[0, 1:, 2], x[0, 0] = 0, x[0, 0] / x[0, 0].sum()
    expected = -torch.special.xlogy(x[:, :, None], y[:, None]).sum(-1)
    torch.testing.assert_close(pairwise_cost(x, y, metric="cross_entropy"), expected)
    assert expected.isfinite().all()


@of_all_metrics
@pytest.mark.usefixtures("backend")
def test_an_infinite_cost_that_nothing_needs_passes_no_gradient():
    x = torch.tensor([[[0.5, 0.5]]], requires_grad=True)
    y = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]], requires_grad=True)
    cost = pairwise_cost(x, y, metric="cross_entropy")
    assert cost[0, 0, 0] == float("inf")
    cost[0, 0, 1].backward()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


@pytest.mark.usefixtures("backend")
def test_a_side_that_needs_no_gradient_gets_none():
    x, y = torch.randn(1, 2, 3), torch.randn(1, 4, 3, requires_grad=True)
    pairwise_cost(x, y).sum().backward()
    assert x.grad is None
    assert y.grad is not None


@pytest.mark.usefixtures("backend")
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
