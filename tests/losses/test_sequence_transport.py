import pytest
import torch

from mlot_kernels import SequenceTransportLoss, sequence_transport_loss
from tests.dispatch_modes import NoHostSync


def test_is_the_transport_that_pot_finds():
    ot = pytest.importorskip("ot", reason="POT is the oracle here")
    x, y = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([6, 3]), torch.tensor([4, 5])
    ours = {
        regularized: sequence_transport_loss(
            x,
            y,
            *lengths,
            metric="sqeuclidean",
            epsilon=1.0,
            iterations=3000,
            reduction="none",
            regularized=regularized,
        )
        for regularized in (False, True)
    }
    for b in range(2):
        a, c = x[b, : lengths[0][b]], y[b, : lengths[1][b]]
        cost = ot.dist(a.numpy(), c.numpy())
        expected = ot.solve(cost, reg=1.0, reg_type="KL", max_iter=20_000, tol=1e-13)
        assert ours[False][b].item() == pytest.approx(float(expected.value_linear), rel=1e-6)
        assert ours[True][b].item() == pytest.approx(float(expected.value), rel=1e-6)


@pytest.mark.parametrize("gradient", ["unrolled", "implicit", "envelope"])
def test_ragged_batches_are_their_sequences(gradient):
    options = {"gradient": gradient, "regularized": gradient == "envelope", "metric": "l2", "iterations": 50}
    x, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 0]), torch.tensor([3, 7, 4])
    for side, n in zip((x, y), lengths, strict=True):
        for b in range(3):
            side[b, n[b] :] = float("nan")
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    each = sequence_transport_loss(*leaves, *lengths, reduction="none", **options)
    assert each[2] == 0
    each.sum().backward()
    for b in range(2):
        part = x[b : b + 1, : lengths[0][b]].clone().requires_grad_(), y[b : b + 1, : lengths[1][b]]
        alone = sequence_transport_loss(*part, **options)
        torch.testing.assert_close(alone, each[b])
        alone.backward()
        torch.testing.assert_close(leaves[0].grad[b, : lengths[0][b]], part[0].grad[0])
    assert leaves[0].grad.isfinite().all()
    assert leaves[1].grad.isfinite().all()
    mean = sequence_transport_loss(x, y, *lengths, **options)
    torch.testing.assert_close(mean, each.detach().sum() / 2)
    torch.testing.assert_close(
        sequence_transport_loss(x, y, *lengths, num_items_in_batch=5, **options), each.detach().sum() / 5
    )


def test_gradcheck_weights_and_components():
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)
    weight = torch.rand(2, 4, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda a, b: sequence_transport_loss(a, b, token_weight=weight, iterations=5),
        (x.requires_grad_(), y.requires_grad_()),
    )
    loss, parts = sequence_transport_loss(x, y, token_weight=2 * torch.ones(2, 4).double(), return_components=True)
    torch.testing.assert_close(loss, 2 * sequence_transport_loss(x, y))
    torch.testing.assert_close(parts["transport"], loss.detach())
    assert parts["iterations"].item() == 20


def test_a_module_is_its_function_and_composes():
    x, y = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    options = {"metric": "l1", "epsilon": 2.0, "marginals": "unit", "iterations": 7, "tolerance": 1e-5}
    module = SequenceTransportLoss(**options)
    assert "epsilon=2.0" in repr(module)
    lengths = torch.tensor([5, 3]), torch.tensor([6, 2])
    expected = sequence_transport_loss(x, y, *lengths, **options)
    torch.testing.assert_close(module(x, y, *lengths), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, *lengths), expected)
    with NoHostSync():
        module(x, y, *lengths, return_components=True)


X, Y = torch.randn(2, 3, 4), torch.randn(2, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X[0], Y), {}, ValueError, r"x must be \[B, M, D\], got \(3, 4\)"),
        ((X, Y[..., :3]), {}, ValueError, r"y must be \[B, N, D\]"),
        ((X, Y, torch.ones(2)), {}, TypeError, "row_lengths must be one of"),
        ((X, Y), {"metric": "l7"}, ValueError, "metric must be one of"),
        ((X, Y), {"epsilon": 0}, ValueError, "epsilon must be above 0"),
        ((X, Y), {"marginals": (X, Y)}, ValueError, "marginals must be one of 'uniform', 'unit'"),
        ((X, Y), {"gradient": "envelope"}, ValueError, "pass regularized=True"),
        ((X, Y), {"regularized": True, "token_weight": Y[..., 0]}, ValueError, "token_weight is no part"),
        ((X, Y), {"reduction": "all"}, ValueError, "reduction must be one of"),
        ((X, Y), {"p": 1}, TypeError, "p"),
    ],
)
def test_bad_input_is_named(arguments, options, error, words):
    with pytest.raises(error, match=words):
        sequence_transport_loss(*arguments, **options)


def test_a_module_names_bad_options_at_once():
    for options in ({"metric": "l7"}, {"epsilon": -1}, {"gradient": "envelope"}, {"backend": "fast"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SequenceTransportLoss(**options)
