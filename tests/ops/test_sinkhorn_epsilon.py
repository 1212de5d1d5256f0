"""Sinkhorn's two domains at any epsilon, on kernels that hold a problem and kernels that stream it; when it stops."""

import pytest
import torch

from mlot_kernels import sinkhorn
from mlot_kernels.ops.sinkhorn import reference
from mlot_kernels.transport import DOMAINS
from tests.conftest import backends_of, of_triton

BACKENDS = backends_of("sinkhorn")
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_kernels = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
by_family = pytest.mark.parametrize("family", ["random", "one shifted column", "diagonal"])
by_epsilon = pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])


@by_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@by_epsilon
@by_family
def test_log_and_scaling_domains_agree_at_any_epsilon(backend, dtype, epsilon, family):
    _agrees_with_the_definition(_costs(family), dtype, epsilon, 40, backend)


@by_kernels
@by_epsilon
@by_family
def test_kernels_agree_after_hundreds_of_steps(backend, epsilon, family):
    for dtype in (torch.float64, torch.float32):
        _agrees_with_the_definition(_costs(family)[:1], dtype, epsilon, 400, backend)


by_form = pytest.mark.parametrize(
    "form",
    [{"one_slab": 2**20}, {}, {"widest": 8}],
    ids=["all steps a launch", "tiles of whole rows", "tiles of a slab's rows"],
)


@of_triton
@by_form
@pytest.mark.parametrize("epsilon", [1e-4, 1e-2, 1.0])
@by_family
def test_triton_streams_problems_at_any_epsilon(form, epsilon, family, streamed):
    streamed(**form)
    for dtype in (torch.float64, torch.float32):
        _agrees_with_the_definition(_costs(family)[:1], dtype, epsilon, 40, "triton")


@pytest.fixture
def streamed(monkeypatch):
    """Makes the Triton kernels stream problems of any size."""

    def limit(widest=1024, one_slab=0):
        from mlot_kernels import triton_transport_resident, triton_transport_slabs

        for name in ("ELEMENTS", "LONG_ELEMENTS"):
            monkeypatch.setattr(triton_transport_resident, name, 0)
        monkeypatch.setattr(triton_transport_slabs, "WIDEST", widest)
        monkeypatch.setattr(triton_transport_slabs, "ONE_SLAB", one_slab)

    return limit


def _costs(family: str) -> torch.Tensor:
    if family == "diagonal":
        return (torch.arange(8.0)[:, None] - torch.arange(6.0)).abs().double().expand(2, 8, 6) / 4
    cost = torch.rand(2, 8, 6, dtype=torch.float64)
    if family == "one shifted column":
        cost[:, :, 2] += 6
    return cost


def _agrees_with_the_definition(
    cost: torch.Tensor, dtype: torch.dtype, epsilon: float, iterations: int, backend: str
) -> None:
    """Value and gradient, in both domains: no NaN, and errors that rounding of range(cost) / epsilon explains."""
    truth = _cost_and_gradient(cost.to(dtype).double(), epsilon, iterations, "log", "reference")
    spread = float(cost.max() - cost.min()) / epsilon
    for domain in ("log", "scaling"):
        ours = _cost_and_gradient(cost.to(dtype), epsilon, iterations, domain, backend)
        for x, y in zip(ours, truth, strict=True):
            assert x.isfinite().all()
            last_places = 1e-10 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
            bound = last_places * max(1.0, spread) * float(y.abs().max()) + torch.finfo(dtype).eps / epsilon
            torch.testing.assert_close(x.double(), y, rtol=0, atol=bound)


def _cost_and_gradient(
    cost: torch.Tensor, epsilon: float, iterations: int, domain: str, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = cost.clone().requires_grad_()
    solved = sinkhorn(leaf, epsilon=epsilon, domain=domain, iterations=iterations, backend=backend)
    solved.cost.sum().backward()
    return solved.cost.detach(), leaf.grad


@by_backend
def test_auto_scales_where_the_kernel_cannot_underflow(backend):
    cost = torch.rand(1, 6, 6).repeat(4, 1, 1)
    cost = cost / (cost.max() - cost.min()) * torch.tensor([0.1, 7.9, 8.1, 500.0])[:, None, None]
    cost[0, 1, 2] = float("inf")  # a forbidden pair is exactly 0 in either domain
    prefers = reference.prefers_scaling(reference.problem(cost, None, None, None, None, 0.1, "uniform"), 0.1)
    assert prefers.tolist() == [True, True, False, False]
    auto, log, scaling = (
        sinkhorn(cost, domain=domain, return_plan=True, backend=backend).row_potential
        for domain in ("auto", "log", "scaling")
    )
    assert torch.equal(auto[:2], scaling[:2])
    assert torch.equal(auto[2:], log[2:])
    assert not torch.equal(scaling[1], log[1])  # else the lines above show nothing


@by_backend
def test_scaling_absorbs_before_it_overflows(backend):
    cost = torch.rand(1, 5, 5) * 3
    cost[:, :, 0] += 6
    plan = sinkhorn(cost, epsilon=0.02, iterations=200, domain="scaling", return_plan=True, backend=backend).plan
    truth = sinkhorn(cost.double(), epsilon=0.02, iterations=200, domain="log", return_plan=True).plan
    torch.testing.assert_close(plan.double(), truth, rtol=0, atol=1e-4)


@by_backend
@pytest.mark.parametrize("domain", DOMAINS)
def test_each_problem_stops_by_itself(backend, domain):
    cost = torch.rand(3, 6, 6, dtype=torch.float64) * torch.tensor([0.01, 1.0, 3.0])[:, None, None]
    solved = sinkhorn(cost, iterations=500, tolerance=1e-6, domain=domain, backend=backend)
    steps = solved.iterations.tolist()
    assert steps[0] < steps[1] < steps[2] < 500
    for b in range(3):
        leaf, exact = cost[b : b + 1].clone().requires_grad_(), cost[b : b + 1].clone().requires_grad_()
        alone = sinkhorn(leaf, iterations=500, tolerance=1e-6, domain=domain, backend=backend)
        fixed = sinkhorn(exact, iterations=steps[b], domain=domain, backend=backend)
        assert alone.iterations.item() == steps[b]
        torch.testing.assert_close(alone.cost[0], solved.cost[b])
        torch.testing.assert_close(alone.cost, fixed.cost)
        alone.cost.sum().backward()
        fixed.cost.sum().backward()
        torch.testing.assert_close(leaf.grad, exact.grad)


@of_triton
@by_form
def test_triton_stops_each_streamed_problem_by_itself(form, streamed):
    streamed(**form)
    cost = torch.rand(3, 40, 130, dtype=torch.float64) * torch.tensor([0.01, 1.0, 3.0])[:, None, None]
    cost[0] = 0.5
    options = {"iterations": 12, "tolerance": 3e-2, "row_lengths": torch.tensor([40, 38, 2]), "return_plan": True}
    found = []
    for backend in ("triton", "reference"):
        leaf = cost.clone().requires_grad_()
        solved = sinkhorn(leaf, backend=backend, **options)
        (solved.cost.sum() - solved.regularized_cost.sum() + solved.plan.square().sum()).backward()
        found.append([*(x.detach() for x in solved), leaf.grad])
    assert found[0][5].tolist() == found[1][5].tolist()
    assert found[0][5][0] == 1 < found[0][5][1] < 12
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)
