import pytest
import torch

from mlot_kernels import BackendUnavailable, sinkhorn
from mlot_kernels.transport import DOMAINS
from tests.conftest import backends_of
from tests.properties import given, st

BACKENDS = backends_of("sinkhorn")
KERNELS = [name for name in BACKENDS if name != "reference"]
IMPLICIT = [name for name in BACKENDS if name not in ("triton", "cuda")]  # which refuse it: test_gpus_refuse_...
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_kernels = pytest.mark.parametrize("backend", KERNELS)
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels are not built")


def published_loop(cost: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """The plan as the Multi-Level-OT paper writes it, for autograd to differentiate."""
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan


@by_backend
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("M", "N"), [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)])
def test_unit_marginals_equal_autograd_of_the_plain_loop(backend, domain, M, N):
    cost = torch.rand(2, M, N, dtype=torch.float64)
    ours, loop = cost.clone().requires_grad_(), cost.clone().requires_grad_()
    solved = sinkhorn(ours, marginals="unit", domain=domain, return_plan=True, backend=backend)
    plan = published_loop(loop, 0.1, 20)
    torch.testing.assert_close(solved.plan, plan)
    torch.testing.assert_close(solved.cost, (plan * loop).sum((1, 2)))
    solved.cost.sum().backward()
    (plan * loop).sum().backward()
    torch.testing.assert_close(ours.grad, loop.grad, rtol=1e-8, atol=1e-10)


@by_backend
@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "given"])
def test_equals_pot_at_convergence(backend, epsilon, kind):
    ot = pytest.importorskip("ot", reason="POT is the oracle here")
    cost = torch.rand(3, 7, 5, dtype=torch.float64)
    a, b = (m / m.sum(1, keepdim=True) for m in (torch.rand(3, 7).double() + 0.1, torch.rand(3, 5).double() + 0.1))
    if kind == "uniform":
        a, b = torch.full_like(a, 1 / 7), torch.full_like(b, 1 / 5)
    solved = sinkhorn(
        cost,
        epsilon=epsilon,
        iterations=5000,
        tolerance=1e-13,
        marginals="uniform" if kind == "uniform" else (a, b),
        return_plan=True,
        backend=backend,
    )
    for i in range(3):
        arguments = [x[i].numpy() for x in (a, b, cost)]
        plan = ot.bregman.sinkhorn_log(*arguments, reg=epsilon, numItermax=20_000, stopThr=1e-14)
        torch.testing.assert_close(solved.plan[i], torch.tensor(plan), rtol=1e-7, atol=1e-10)
        other = ot.solve(arguments[2], *arguments[:2], reg=epsilon, reg_type="KL", max_iter=20_000, tol=1e-14)
        torch.testing.assert_close(solved.regularized_cost[i].item(), float(other.value), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(solved.cost[i].item(), float(other.value_linear), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", [name for name in ("triton", "cuda") if name in BACKENDS])
def test_gpus_refuse_the_implicit_gradient(backend):
    with pytest.raises(
        BackendUnavailable, match=rf"sinkhorn: backend '{backend}': it has no gradient='implicit'; pass"
    ):
        sinkhorn(torch.rand(1, 3, 3), gradient="implicit", backend=backend)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="the CUDA kernels on the CPU: tests/native/test_cuda_on_host.py")
@pytest.mark.parametrize("domain", ["scaling", "log"])
@pytest.mark.parametrize("shared", [8000, 0], ids=["a few rows at a time", "a workspace in device memory"])
def test_cuda_equals_the_reference_beyond_shared_memory(shared, domain, monkeypatch):
    monkeypatch.setenv("MLOT_ON_HOST_CLUSTER", "2")
    monkeypatch.setenv("MLOT_ON_HOST_THREADS", "32")
    monkeypatch.setenv("MLOT_ON_HOST_SHARED", str(shared))
    cost, (a, b), weight = _weighted_problem(3, 50, 30)
    cost[0] = 0.5
    cost[1, :, 3] += 3  # takes its scalings in more than once
    options = {"iterations": 30, "epsilon": 0.01, "tolerance": 3e-2, "domain": domain}
    a[2, 9] = b[2, 4] = 0
    ours, truth = (_everything(backend, cost, [a, b], weight, **options) for backend in ("cuda", "reference"))
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10 * 400 * float(y.abs().max()))


@by_backend
def test_without_tolerance_every_step_is_taken(backend):
    assert sinkhorn(torch.zeros(2, 3, 3), iterations=7, backend=backend).iterations.tolist() == [7, 7]
    assert sinkhorn(torch.zeros(2, 3, 3), iterations=7, tolerance=1e-9, backend=backend).iterations.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("gradient", "backend"), [*(("envelope", name) for name in BACKENDS), *(("implicit", name) for name in IMPLICIT)]
)
def test_other_gradients_are_exact_in_the_limit(backend, gradient):
    cost = torch.rand(2, 5, 6, dtype=torch.float64)
    weight = torch.rand(2, 6, dtype=torch.float64)
    grads = []
    for kind in (gradient, "unrolled"):
        leaf = cost.clone().requires_grad_()
        options = {"iterations": 3000, "epsilon": 0.2, "column_weight": weight, "return_plan": True}
        solved = sinkhorn(leaf, gradient=kind, backend=backend, **options)
        total = solved.regularized_cost.sum()
        if gradient == "implicit":
            total = total + solved.cost.sum() + (solved.plan * torch.arange(6.0)).sum()
        total.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)
    if gradient == "envelope":
        assert not sinkhorn(leaf, gradient="envelope", backend=backend).cost.requires_grad


@pytest.mark.parametrize("backend", IMPLICIT)
def test_implicit_gradients_allow_ragged_problems(backend):
    cost = torch.rand(2, 5, 6, dtype=torch.float64)
    lengths = {"row_lengths": torch.tensor([3, 0]), "column_lengths": torch.tensor([4, 6])}
    leaf = cost.clone().requires_grad_()
    sinkhorn(leaf, iterations=2000, gradient="implicit", backend=backend, **lengths).cost.sum().backward()
    alone = cost[:1, :3, :4].clone().requires_grad_()
    sinkhorn(alone, iterations=2000, gradient="implicit", backend=backend).cost.sum().backward()
    torch.testing.assert_close(leaf.grad[:1, :3, :4], alone.grad)
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[1] == 0).all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_marginals_hold(M, N, seed):
    cost = torch.rand(1, M, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for marginals, rows, columns in (("uniform", 1 / M, 1 / N), ("unit", N / M, 1.0)):
        plan = sinkhorn(cost, epsilon=0.5, marginals=marginals, iterations=200, return_plan=True).plan
        torch.testing.assert_close(plan.sum(1), torch.full((1, N), columns, dtype=torch.float64))
        torch.testing.assert_close(plan.sum(2), torch.full((1, M), rows, dtype=torch.float64), rtol=1e-6, atol=1e-8)


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_scaling_cost_and_epsilon_scales_the_result(seed, factor):
    cost = torch.rand(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain, scaled = sinkhorn(cost), sinkhorn(cost * factor, epsilon=0.1 * factor)
    torch.testing.assert_close(scaled.cost, plain.cost * factor)
    torch.testing.assert_close(scaled.row_potential, plain.row_potential * factor)


def test_potentials_make_the_plan():
    cost = torch.rand(2, 4, 5, dtype=torch.float64)
    solved = sinkhorn(cost, return_plan=True)
    f, g = solved.row_potential[:, :, None], solved.column_potential[:, None, :]
    torch.testing.assert_close(((f + g - cost) / 0.1).exp(), solved.plan)


def test_many_steps_between_sides_of_different_length_do_not_drift():
    solved = sinkhorn(torch.rand(1, 64, 16), marginals="unit", iterations=500, domain="scaling")
    assert solved.row_potential.abs().max() < 1
    assert solved.cost.isfinite().all()


@by_backend
def test_a_row_that_can_go_nowhere_shows(backend):
    cost = torch.rand(2, 3, 4)
    cost[0, 1] = float("inf")
    solved = sinkhorn(cost, backend=backend)
    assert solved.cost.isnan().tolist() == [True, False]


@by_backend
@pytest.mark.parametrize("domain", DOMAINS)
def test_what_has_marginal_0_takes_no_part(backend, domain):
    cost = torch.rand(1, 3, 4, dtype=torch.float64)
    a, b = torch.tensor([[0.4, 0.6, 0.0]]).double(), torch.tensor([[0.5, 0.25, 0.25, 0.0]]).double()
    cost[0, 2], cost[0, :, 3] = float("nan"), float("nan")
    leaf, part = cost.clone().requires_grad_(), cost[:, :2, :3].clone().requires_grad_()
    whole = sinkhorn(leaf, marginals=(a, b), iterations=1, domain=domain, backend=backend)
    alone = sinkhorn(part, marginals=(a[:, :2], b[:, :3]), iterations=1, domain=domain, backend=backend)
    torch.testing.assert_close(whole.cost, alone.cost)
    whole.cost.sum().backward()
    alone.cost.sum().backward()
    torch.testing.assert_close(leaf.grad[:, :2, :3], part.grad)
    assert leaf.grad.isfinite().all()


@by_backend
@pytest.mark.parametrize("domain", DOMAINS)
def test_what_does_not_count_does_not_keep_a_problem_from_stopping(backend, domain):
    cost = torch.rand(2, 5, 6, dtype=torch.float64)
    cost[0] = 0.5
    lengths = {"row_lengths": torch.tensor([3, 4]), "column_lengths": torch.tensor([4, 5])}
    options = {"iterations": 300, "tolerance": 1e-6, "domain": domain, "backend": backend}
    steps = sinkhorn(cost, **options, **lengths).iterations.tolist()
    alone = [sinkhorn(cost[b : b + 1, : 3 + b, : 4 + b], **options).iterations.item() for b in range(2)]
    assert steps == alone
    assert steps[0] == 1


def _everything(backend, cost, marginals, weight, **options):
    """Values, the plan, and all gradients for upstream gradients of several sizes."""
    leaves = [x.detach().clone().requires_grad_() for x in (cost, *marginals, weight)]
    solved = sinkhorn(
        leaves[0], marginals=tuple(leaves[1:3]), column_weight=leaves[3], return_plan=True, backend=backend, **options
    )
    upstream = torch.linspace(-1, 2, solved.plan.numel(), dtype=solved.plan.dtype).view_as(solved.plan)
    total = 1.3 * solved.cost.sum() - 0.7 * solved.regularized_cost.sum() + (solved.plan * upstream).sum()
    return [*(x.detach() for x in solved[:5]), *torch.autograd.grad(total, leaves)]


def _weighted_problem(B, M, N):
    cost = torch.rand(B, M, N, dtype=torch.float64)
    marginals = [m / m.sum(1, keepdim=True) for m in (torch.rand(B, n, dtype=torch.float64) + 0.1 for n in (M, N))]
    return cost, marginals, torch.rand(B, N, dtype=torch.float64)


@by_kernels
@pytest.mark.parametrize("domain", ["log", "scaling"])
@pytest.mark.parametrize(
    ("M", "N", "epsilon"),
    [
        pytest.param(150, 70, 0.1, id="slabs of rows"),
        pytest.param(67, 601, 0.1, id="long rows"),
        pytest.param(9, 12, 1e-3, id="a range of 1000"),
        pytest.param(70, 9, 2e-4, id="many segments"),
    ],
)
def test_kernels_equal_the_reference_beyond_the_size_of_cases(backend, domain, M, N, epsilon):
    problem = _weighted_problem(2, M, N)
    problem[0][:, :, 3] += 3
    options = {"epsilon": epsilon, "iterations": 60, "domain": domain}
    ours, truth = (_everything(backend, *problem, **options) for backend in (backend, "reference"))
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10 * max(1.0, 4 / epsilon) * float(y.abs().max()))


@by_kernels
def test_kernels_keep_marginal_gradients_through_hundreds_of_steps(backend):
    problem = _weighted_problem(1, 24, 17)
    single = [problem[0].float(), [m.float() for m in problem[1]], problem[2].float()]
    exact = [single[0].double(), [m.double() for m in single[1]], single[2].double()]
    for domain in ("log", "scaling"):
        options = {"epsilon": 1.0, "iterations": 400, "domain": domain}
        ours, truth = _everything(backend, *single, **options), _everything("reference", *exact, **options)
        for x, y in zip(ours[-3:], truth[-3:], strict=True):
            torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-6 * float(y.abs().max()))


@needs_cpu
@pytest.mark.parametrize("domain", ["log", "scaling"])
def test_threads_change_no_bit_within_one_large_problem(domain):
    problem = _weighted_problem(1, 520, 515)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(_everything("cpu", *(problem[0].float(), problem[1], problem[2]), iterations=3, domain=domain))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@by_kernels
def test_kernels_read_a_cost_in_its_place_as_they_read_a_copy(backend):
    wide = torch.rand(2, 64, 200)
    for cost in (wide[:, :, 3:67], wide[:, :, 3:67].transpose(1, 2), wide[:, ::2, 8:136], wide[:, :8, 3:183]):
        for x, y in zip(sinkhorn(cost, backend=backend)[:2], sinkhorn(cost.clone(), backend=backend)[:2], strict=True):
            assert torch.equal(x, y)


def test_plan_is_none_unless_asked_for():
    assert sinkhorn(torch.rand(1, 2, 2)).plan is None


C = torch.rand(2, 3, 4)
A, B = torch.full((2, 3), 1 / 3), torch.full((2, 4), 1 / 4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cost": C[0]}, ValueError, r"cost must be \[B, M, N\], got \(3, 4\); pass cost\[None\]"),
        ({"cost": C.long()}, TypeError, "cost must be one of .*got torch.int64"),
        ({"epsilon": 0}, ValueError, "epsilon must be above 0, got 0"),
        ({"epsilon": -0.1}, ValueError, "epsilon must be above 0, got -0.1"),
        ({"epsilon": float("inf")}, ValueError, "epsilon must be finite"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"iterations": 2.5}, TypeError, "iterations must be an int"),
        ({"tolerance": -1e-3}, ValueError, "tolerance must be at least 0"),
        ({"domain": "linear"}, ValueError, "domain must be one of 'auto', 'log', 'scaling', got 'linear'"),
        ({"gradient": "last"}, ValueError, "gradient must be one of 'unrolled', 'envelope', 'implicit'"),
        ({"marginals": "ones"}, ValueError, "marginals must be one of 'uniform', 'unit', got 'ones'"),
        ({"marginals": A}, TypeError, "marginals must be 'uniform', 'unit' or two tensors"),
        ({"marginals": (A, A)}, ValueError, r"marginals\[1\] must be \[B, N\] of cost, \(2, 4\) here, got \(2, 3\)"),
        ({"row_lengths": torch.ones(2)}, TypeError, "row_lengths must be one of torch.int32, torch.int64"),
        ({"column_lengths": torch.ones(3).long()}, ValueError, r"column_lengths must be \[B\] of cost, \(2,\) here"),
        ({"column_weight": A}, ValueError, r"column_weight must be \[B, N\] of cost"),
        ({"column_weight": B.to("meta")}, ValueError, "column_weight on meta"),
        ({"return_plan": 1}, TypeError, "return_plan must be True or False"),
        ({"eps": 0.1}, TypeError, "eps"),
        (
            {"marginals": (A.clone().requires_grad_(), B), "gradient": "implicit"},
            ValueError,
            r"marginals\[0\] requires a gradient, which only gradient='unrolled' gives; got 'implicit'",
        ),
        (
            {"column_weight": B.clone().requires_grad_(), "gradient": "envelope"},
            ValueError,
            "column_weight requires a gradient",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(options, error, words):
    with pytest.raises(error, match=words):
        sinkhorn(**{"cost": C, **options})
