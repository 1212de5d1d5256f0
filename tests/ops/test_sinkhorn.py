import pytest
import torch

from mlot_kernels import sinkhorn
from mlot_kernels.ops.sinkhorn import reference
from mlot_kernels.transport import DOMAINS
from tests.properties import given, st


def published_loop(cost: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """The plan as the Multi-Level-OT paper writes it, for autograd to differentiate."""
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("M", "N"), [(6, 6), (4, 9), (9, 4), (1, 5), (5, 1)])
def test_unit_marginals_equal_autograd_of_the_plain_loop(domain, M, N):
    cost = torch.rand(2, M, N, dtype=torch.float64)
    ours, loop = cost.clone().requires_grad_(), cost.clone().requires_grad_()
    solved = sinkhorn(ours, marginals="unit", domain=domain, return_plan=True)
    plan = published_loop(loop, 0.1, 20)
    torch.testing.assert_close(solved.plan, plan)
    torch.testing.assert_close(solved.cost, (plan * loop).sum((1, 2)))
    solved.cost.sum().backward()
    (plan * loop).sum().backward()
    torch.testing.assert_close(ours.grad, loop.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "given"])
def test_equals_pot_at_convergence(epsilon, kind):
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
    )
    for i in range(3):
        arguments = [x[i].numpy() for x in (a, b, cost)]
        plan = ot.bregman.sinkhorn_log(*arguments, reg=epsilon, numItermax=20_000, stopThr=1e-14)
        torch.testing.assert_close(solved.plan[i], torch.tensor(plan), rtol=1e-7, atol=1e-10)
        other = ot.solve(arguments[2], *arguments[:2], reg=epsilon, reg_type="KL", max_iter=20_000, tol=1e-14)
        torch.testing.assert_close(solved.regularized_cost[i].item(), float(other.value), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(solved.cost[i].item(), float(other.value_linear), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("family", ["random", "one shifted column", "diagonal"])
def test_log_and_scaling_domains_agree_at_any_epsilon(dtype, epsilon, family):
    cost = torch.rand(2, 8, 6, dtype=torch.float64)
    if family == "one shifted column":
        cost[:, :, 2] += 6
    elif family == "diagonal":
        cost = (torch.arange(8.0)[:, None] - torch.arange(6.0)).abs().double().expand(2, 8, 6) / 4
    truth = _cost_and_gradient(cost, epsilon, "log")
    spread = float(cost.max() - cost.min()) / epsilon
    for domain in ("log", "scaling"):
        ours = _cost_and_gradient(cost.to(dtype), epsilon, domain)
        for x, y in zip(ours, truth, strict=True):
            assert x.isfinite().all()
            last_places = 1e-10 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
            bound = last_places * max(1.0, spread) * float(y.abs().max()) + torch.finfo(dtype).eps / epsilon
            torch.testing.assert_close(x.double(), y, rtol=0, atol=bound)


def _cost_and_gradient(cost: torch.Tensor, epsilon: float, domain: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = cost.clone().requires_grad_()
    solved = sinkhorn(leaf, epsilon=epsilon, domain=domain, iterations=40)
    solved.cost.sum().backward()
    return solved.cost.detach(), leaf.grad


def test_auto_scales_where_the_kernel_cannot_underflow():
    cost = torch.rand(1, 6, 6).repeat(4, 1, 1)
    cost = cost / (cost.max() - cost.min()) * torch.tensor([0.1, 7.9, 8.1, 500.0])[:, None, None]
    cost[0, 1, 2] = float("inf")  # a forbidden pair is exactly 0 in either domain
    prefers = reference.prefers_scaling(reference.problem(cost, None, None, None, None, 0.1, "uniform"), 0.1)
    assert prefers.tolist() == [True, True, False, False]
    auto, log, scaling = (
        sinkhorn(cost, domain=domain, return_plan=True).row_potential for domain in ("auto", "log", "scaling")
    )
    assert torch.equal(auto[:2], scaling[:2])
    assert torch.equal(auto[2:], log[2:])
    assert not torch.equal(scaling[1], log[1])  # else the lines above show nothing


def test_scaling_absorbs_before_it_overflows():
    cost = torch.rand(1, 5, 5) * 3
    cost[:, :, 0] += 6
    plan = sinkhorn(cost, epsilon=0.02, iterations=200, domain="scaling", return_plan=True).plan
    truth = sinkhorn(cost.double(), epsilon=0.02, iterations=200, domain="log", return_plan=True).plan
    torch.testing.assert_close(plan.double(), truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_problem_stops_by_itself(domain):
    cost = torch.rand(3, 6, 6, dtype=torch.float64) * torch.tensor([0.01, 1.0, 3.0])[:, None, None]
    solved = sinkhorn(cost, iterations=500, tolerance=1e-6, domain=domain)
    steps = solved.iterations.tolist()
    assert steps[0] < steps[1] < steps[2] < 500
    for b in range(3):
        leaf, exact = cost[b : b + 1].clone().requires_grad_(), cost[b : b + 1].clone().requires_grad_()
        alone = sinkhorn(leaf, iterations=500, tolerance=1e-6, domain=domain)
        fixed = sinkhorn(exact, iterations=steps[b], domain=domain)
        assert alone.iterations.item() == steps[b]
        torch.testing.assert_close(alone.cost[0], solved.cost[b])
        torch.testing.assert_close(alone.cost, fixed.cost)
        alone.cost.sum().backward()
        fixed.cost.sum().backward()
        torch.testing.assert_close(leaf.grad, exact.grad)


def test_without_tolerance_every_step_is_taken():
    assert sinkhorn(torch.zeros(2, 3, 3), iterations=7).iterations.tolist() == [7, 7]
    assert sinkhorn(torch.zeros(2, 3, 3), iterations=7, tolerance=1e-9).iterations.tolist() == [1, 1]


@pytest.mark.parametrize("gradient", ["envelope", "implicit"])
def test_other_gradients_are_exact_in_the_limit(gradient):
    cost = torch.rand(2, 5, 6, dtype=torch.float64)
    weight = torch.rand(2, 6, dtype=torch.float64)
    grads = []
    for kind in (gradient, "unrolled"):
        leaf = cost.clone().requires_grad_()
        solved = sinkhorn(leaf, iterations=3000, epsilon=0.2, gradient=kind, column_weight=weight, return_plan=True)
        total = solved.regularized_cost.sum()
        if gradient == "implicit":
            total = total + solved.cost.sum() + (solved.plan * torch.arange(6.0)).sum()
        total.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)
    if gradient == "envelope":
        assert not sinkhorn(leaf, gradient="envelope").cost.requires_grad


def test_implicit_gradients_allow_ragged_problems():
    cost = torch.rand(2, 5, 6, dtype=torch.float64)
    lengths = {"row_lengths": torch.tensor([3, 0]), "column_lengths": torch.tensor([4, 6])}
    leaf = cost.clone().requires_grad_()
    sinkhorn(leaf, iterations=2000, gradient="implicit", **lengths).cost.sum().backward()
    alone = cost[:1, :3, :4].clone().requires_grad_()
    sinkhorn(alone, iterations=2000, gradient="implicit").cost.sum().backward()
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


def test_a_row_that_can_go_nowhere_shows():
    cost = torch.rand(2, 3, 4)
    cost[0, 1] = float("inf")
    solved = sinkhorn(cost)
    assert solved.cost.isnan().tolist() == [True, False]


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_has_marginal_0_takes_no_part(domain):
    cost = torch.rand(1, 3, 4, dtype=torch.float64)
    a, b = torch.tensor([[0.4, 0.6, 0.0]]).double(), torch.tensor([[0.5, 0.25, 0.25, 0.0]]).double()
    cost[0, 2], cost[0, :, 3] = float("nan"), float("nan")
    leaf, part = cost.clone().requires_grad_(), cost[:, :2, :3].clone().requires_grad_()
    whole = sinkhorn(leaf, marginals=(a, b), iterations=1, domain=domain)
    alone = sinkhorn(part, marginals=(a[:, :2], b[:, :3]), iterations=1, domain=domain)
    torch.testing.assert_close(whole.cost, alone.cost)
    whole.cost.sum().backward()
    alone.cost.sum().backward()
    torch.testing.assert_close(leaf.grad[:, :2, :3], part.grad)
    assert leaf.grad.isfinite().all()


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
