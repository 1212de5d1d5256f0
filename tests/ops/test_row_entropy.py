import pytest
import torch

from mlot_kernels import Logits, Rows, row_entropy


def test_equals_scipy_and_torch():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle here")
    x = torch.randn(2, 5, 30, dtype=torch.float64) * 3
    expected = torch.tensor(stats.entropy(x.softmax(-1).numpy(), axis=-1))
    torch.testing.assert_close(row_entropy(x), expected)
    torch.testing.assert_close(row_entropy(x), torch.distributions.Categorical(logits=x).entropy())


def test_known_values():
    torch.testing.assert_close(row_entropy(torch.zeros(1, 8)), torch.tensor([8.0]).log())
    assert row_entropy(torch.tensor([[100.0, 0, 0]])).item() < 1e-40
    assert row_entropy(torch.zeros(1, 1)).item() == 0


def test_nothing_counted_gives_zeros_and_a_zero_gradient():
    x = torch.full((2, 3, 4), float("nan"), requires_grad=True)
    entropy = row_entropy(Logits(x, Rows.from_mask(torch.zeros(2, 3, dtype=torch.bool))))
    entropy.sum().backward()
    assert (entropy == 0).all()
    assert (x.grad == 0).all()


def test_gradients_have_their_inputs_dtypes():
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    entropy = row_entropy(Logits(x, log_scale=scale))
    entropy.sum().backward()
    assert (entropy.dtype, x.grad.dtype, scale.grad.dtype) == (torch.float32, torch.bfloat16, torch.float16)
