"""What only the C++ kernel of rank_truncate does: it leaves tiles out, raises exponentials to powers, splits sums among
threads and streams gradients past the cache."""

import pytest
import torch

from mlot_kernels import Logits, Rows, gather_columns, native, rank_truncate
from mlot_kernels.ops.rank_truncate.reference import rank

pytestmark = pytest.mark.skipif(native.MISSING["cpu"] is not None, reason=f"no C++: {native.MISSING['cpu']}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def randn(*shape, dtype=torch.float32, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).mul(scale).to(dtype)


def peaked(rows, vocabulary):
    """A few columns lead everywhere, and each row has leaders of its own."""
    values = randn(2, rows, vocabulary) - torch.arange(vocabulary).add(1).log()
    values[..., 7::997] += 6
    return values.scatter_add(2, torch.randint(vocabulary, (2, rows, 5)), torch.full((2, rows, 5), 9.0))


def far_apart(rows, vocabulary):
    """Most probabilities underflow, so that most sums are equal: 0."""
    return randn(2, rows, vocabulary, scale=400)


def equal(rows, vocabulary):
    return torch.zeros(2, rows, vocabulary)


def one_leads(rows, vocabulary):
    """Every row is all but one-hot, at the same column."""
    values = randn(2, rows, vocabulary, scale=0.01)
    values[..., vocabulary // 2] = 50
    return values


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "batch", "token"])
@pytest.mark.parametrize("make", [peaked, far_apart, equal, one_leads, lambda r, v: randn(2, r, v, scale=1e-3)])
@pytest.mark.parametrize("vocabulary", [64, 5003])
def test_tiles_that_are_left_out_hold_none_of_the_largest_sums(make, scope, masked, vocabulary):
    values, k = make(70, vocabulary), 50
    columns = torch.arange(vocabulary) % 5 > 1 if masked else None
    found = rank_truncate(Logits(values, columns=columns), k=k, scope=scope, backend="cpu").columns
    log_p = values.double().log_softmax(-1)
    index = torch.arange(70).expand(2, -1)
    _, best = rank(log_p, index, columns, k, scope)
    p = log_p.exp()
    sums = p if scope == "token" else p.sum(1) if scope == "sequence" else p.sum((0, 1)).expand(2, -1)
    if columns is not None:
        sums = sums.masked_fill(~columns, -1)
    torch.testing.assert_close(sums.gather(-1, found), best, rtol=1e-5, atol=1e-37)
    assert (found.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("also_at", [(2.0,), (0.5,), (1.0,), (3.0,), (0.25,), (2.0, 4.0, 1.7), (3.0, 1.5)])
@pytest.mark.parametrize("standardize", [False, True])
def test_temperatures_of_one_exponential_equal_those_of_their_own(dtype, also_at, standardize):
    values = randn(2, 3, 2100, dtype=dtype)
    together = rank_truncate(Logits(values, standardize=standardize), k=20, also_at=also_at, backend="cpu")
    for r, temperature in enumerate((1.0, *also_at)):
        alone = gather_columns(Logits(values, None, temperature, standardize), together.columns, backend="cpu")
        torch.testing.assert_close(together.log_probabilities[r], alone.log_probabilities[0], rtol=2e-6, atol=2e-6)


def test_any_number_of_threads_gives_the_same_bits():
    values = randn(3, 130, 4100, dtype=torch.bfloat16).requires_grad_()
    rows = Rows.from_mask(torch.rand(3, 130, generator=torch.Generator().manual_seed(0)) > 0.3)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            for scope in ("sequence", "batch"):
                ranked = rank_truncate(Logits(values, rows), k=40, scope=scope, also_at=(2.0,), backend="cpu")
                (gradient,) = torch.autograd.grad(ranked.log_probabilities.sum() + ranked.kept_mass.sum(), values)
                results.append((*ranked, gradient))
    finally:
        torch.set_num_threads(threads)
    for i in range(2, len(results)):
        for ours, expected in zip(results[i], results[i % 2], strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_gradients_that_are_streamed_equal_those_that_are_not(dtype, shift):
    """Rows whose gradients start anywhere in memory, in an output large enough to be streamed past the cache."""
    vocabulary = 50_257 + shift
    values = randn(1, 44, vocabulary, dtype=dtype)
    rows = Rows.from_mask(torch.arange(44)[None] % 11 == 0)
    columns = torch.tensor([[0, 1, 31, 32, 33, 1023, 1024, 50_000, vocabulary - 1, 31]])

    def gradient(values, rows):
        leaf = values.detach().requires_grad_()
        logits = Logits(leaf, rows, vocab_size=vocabulary - 7)
        ranked = gather_columns(logits, columns.clamp(max=vocabulary - 8), also_at=(2.0,), backend="cpu")
        weight = torch.arange(1.0, 11) / 10
        return torch.autograd.grad((ranked.log_probabilities * weight).sum(), leaf)[0]

    large = gradient(values, rows)
    assert (large[:, rows.index.new_tensor([i for i in range(44) if i % 11])] == 0).all()
    for i in range(0, 44, 11):
        assert torch.equal(large[:, i], gradient(values[:, i : i + 1], None)[:, 0])
