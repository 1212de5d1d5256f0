import pytest
import torch

from mlot_kernels import BackendUnavailable, soft_rank, use_backend
from tests.conftest import CUDA_ON_HOST, FULL, INTERPRETED, backends_of
from tests.properties import given, st

BACKENDS = backends_of("soft_rank")
WIDEST = {"triton": 64, "cuda": 4096}  # row that a backend takes


def by_width(*widths):
    """Every backend with the widths that it takes."""
    runs = [(width, name) for name in BACKENDS for width in widths if width <= WIDEST.get(name, width)]
    return pytest.mark.parametrize(("width", "backend"), runs, indirect=["backend"])


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def by_scipy(theta):
    """Ranks of a row by its definition: theta - w projected on the monotone sequences, subtracted from theta."""
    np = pytest.importorskip("numpy")
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the oracle here")
    if not hasattr(optimize, "isotonic_regression"):
        pytest.skip("this SciPy has no isotonic_regression")
    theta = theta.double().numpy()
    order = np.argsort(-theta, kind="stable")
    dual = optimize.isotonic_regression(theta[order] - np.arange(len(theta), 0, -1), increasing=False).x
    ranks = np.empty(len(theta))
    ranks[order] = theta[order] - dual
    return torch.tensor(ranks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@by_width(1, 2, 3, 16, 17, 33, 64, 65, 129, 1000, *[4096] * FULL)
@pytest.mark.usefixtures("backend")
def test_equals_scipys_isotonic_regression(width, dtype):
    scales = [0.1, 1, 5, 30, 100] if FULL or not (INTERPRETED or CUDA_ON_HOST) else [3]
    x = torch.stack([torch.randn(width) * scale for scale in scales]).to(dtype)
    ranks = soft_rank(x, epsilon=0.75)
    for row, found in zip(x, ranks, strict=True):
        tolerance = 1e-11 if dtype == torch.float64 else 1e-6 * width
        torch.testing.assert_close(found.double(), by_scipy(row.double() / 0.75), rtol=0, atol=tolerance)


# Gaps around epsilon, so that blocks are pooled far from where they began to violate, on either side.
@by_width(31, 64, 150)
def test_blocks_that_grow_both_ways_equal_the_references(width, backend):
    gaps = torch.tensor([0.0, 0.2, 0.9, 1.0, 1.1, 3.0])[torch.randint(6, (30, width))] * (
        1 + 0.2 * torch.rand(30, width)
    )
    x = gaps.double().cumsum(1)[:, torch.randperm(width)].requires_grad_()
    upstream = torch.randn(30, width, dtype=torch.float64)
    ours, theirs = soft_rank(x), soft_rank(x, backend="reference")
    torch.testing.assert_close(ours, theirs)
    (gradient,), (expected,) = (torch.autograd.grad(y, x, upstream) for y in (ours, theirs))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "values", [5 * torch.randperm(40) - 60, torch.randperm(40), -torch.randperm(40)], ids=["far", "near", "below 0"]
)
def test_ranks_of_separated_values_equal_scipys_rankdata(values, backend):
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle here")
    x = values[None].float().requires_grad_()
    ranks = soft_rank(x)
    assert ranks.flatten().tolist() == stats.rankdata(values.numpy()).tolist()
    (gradient,) = torch.autograd.grad(ranks, x, torch.randn(1, 40))
    assert (gradient == 0).all()


def test_ranks_ascend_as_the_published_ones(backend):
    assert soft_rank(torch.tensor([2.9, 0.1, 1.2])).tolist() == [3, 1, 2]


def test_a_wide_epsilon_makes_one_block_that_equals_the_centred_values(backend):
    p = torch.randn(3, 20, dtype=torch.float64).softmax(-1).requires_grad_()
    ranks = soft_rank(p)
    torch.testing.assert_close(ranks, p - p.mean(-1, keepdim=True) + 10.5)
    upstream = torch.randn(3, 20, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ranks, p, upstream)
    torch.testing.assert_close(gradient, upstream - upstream.mean(-1, keepdim=True))


def test_ties_share_the_mean_of_their_ranks_to_the_bit(backend):
    x = torch.randn(4, 5).repeat(1, 4)[:, torch.randperm(20)]
    for epsilon in (1e-5, 0.3, 1.0, 100.0):
        ranks = soft_rank(x, epsilon=epsilon)
        for row, found in zip(x, ranks, strict=True):
            for value in row.unique():
                assert found[row == value].unique().numel() == 1
        torch.testing.assert_close(ranks.sum(-1), torch.full((4,), 210.0))
    stats = pytest.importorskip("scipy.stats", reason="SciPy is the oracle here")
    assert soft_rank(x, epsilon=1e-5).tolist() == stats.rankdata(x.numpy(), axis=1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_all_tied_row_has_no_nan(dtype, backend):
    x = torch.full((2, 7), 0.3, dtype=dtype, requires_grad=True)
    ranks = soft_rank(x)
    assert (ranks == 4).all()
    (gradient,) = torch.autograd.grad(ranks[:, 0].sum(), x)
    torch.testing.assert_close(gradient[0], torch.tensor([6.0] + [-1.0] * 6).div(7).to(dtype))


def test_a_row_equals_itself_among_others(backend):
    """As it does not in the published ranking loss, whose sets of columns depend on the batch."""
    x, upstream = torch.randn(300, 20).mul(3), torch.randn(300, 20)
    lengths = torch.randint(0, 21, (300,))
    leaf = x.clone().requires_grad_()
    ranks = soft_rank(leaf, lengths)
    (gradient,) = torch.autograd.grad(ranks, leaf, upstream)
    for i in (0, 7, 299):
        alone = x[i : i + 1].clone().requires_grad_()
        found = soft_rank(alone, lengths[i : i + 1])
        assert torch.equal(found[0], ranks[i])
        assert torch.equal(torch.autograd.grad(found, alone, upstream[i : i + 1])[0][0], gradient[i])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_shorter_row_equals_the_row_cut_to_its_length(dtype, backend):
    x = torch.randn(2, 4, 18).mul(2)
    lengths = torch.tensor([[18, 17, 1, 0], [-3, 5, 30, 2]], dtype=dtype)
    poisoned, upstream = x.clone(), torch.randn(2, 4, 18)
    counts = torch.arange(18) < lengths[..., None]
    poisoned[~counts] = float("nan")
    leaf = poisoned.requires_grad_()
    ranks = soft_rank(leaf, lengths, epsilon=0.5)
    (gradient,) = torch.autograd.grad(ranks, leaf, upstream.masked_fill(~counts, float("nan")))
    assert (ranks[~counts] == 0).all()
    assert (gradient[~counts] == 0).all()
    for b in range(2):
        for a in range(4):
            length = int(lengths[b, a].clamp(0, 18))
            cut = x[b, a, :length].clone().requires_grad_()
            found = soft_rank(cut, epsilon=0.5)
            torch.testing.assert_close(ranks[b, a, :length], found)
            torch.testing.assert_close(
                gradient[b, a, :length], torch.autograd.grad(found, cut, upstream[b, a, :length])[0]
            )


def test_infinite_entries_equal_ones_that_are_far_away(backend):
    inf = float("inf")
    x = torch.tensor([[0.4, -inf, inf, 0.1, -inf, 3.0, -inf, inf], [-inf] * 8, [inf, -inf] * 4], requires_grad=True)
    far = x.detach().nan_to_num(posinf=1e30, neginf=-1e30).requires_grad_()
    ranks, upstream = soft_rank(x), torch.randn(3, 8)
    torch.testing.assert_close(ranks, soft_rank(far))
    (gradient,), (of_far,) = (torch.autograd.grad(y, z, upstream) for y, z in ((ranks, x), (soft_rank(far), far)))
    torch.testing.assert_close(gradient, of_far.masked_fill(x.isinf(), 0))


@pytest.mark.parametrize("place", [0, 9, 19])
def test_a_nan_equals_nan_all_over_its_row_and_nowhere_else(place, backend):
    x, lengths = torch.randn(3, 22), torch.full((3,), 20)
    expected = soft_rank(x, lengths)
    x[1, place] = float("nan")
    leaf = x.clone().requires_grad_()
    ranks = soft_rank(leaf, lengths)
    (gradient,) = torch.autograd.grad(ranks.sum(), leaf)
    assert ranks[1, :20].isnan().all()
    assert gradient[1, :20].isnan().all()
    assert (ranks[:, 20:] == 0).all()
    assert (gradient[:, 20:] == 0).all()
    assert torch.equal(ranks[::2], expected[::2])
    assert gradient[::2].isfinite().all()


def test_an_offset_equals_no_offset(backend):
    x = torch.randint(-40, 40, (4, 24)) / 16
    torch.testing.assert_close(soft_rank(x + 2.0**16), soft_rank(x), rtol=0, atol=0)
    x[:, 0] = 1e30  # one entry that swallows the others, where sums ran over all
    y = x.clone()
    y[:, 0] = 1e4
    torch.testing.assert_close(soft_rank(x), soft_rank(y))


@pytest.mark.parametrize("epsilon", [1.2e-38, 1e-20, 1e20, 3.4e38])
def test_any_epsilon_equals_its_limit(epsilon, backend):
    x = torch.tensor([[3.0, 1.0, 3.0, -2.0]], requires_grad=True)
    ranks = soft_rank(x, epsilon=epsilon)
    torch.testing.assert_close(ranks, torch.tensor([[3.5, 2, 3.5, 1]] if epsilon < 1 else [[2.5] * 4]))
    assert not torch.autograd.grad(ranks[0, 1], x)[0].isnan().any()


@by_width(5, 20, 64, 200)
@pytest.mark.usefixtures("backend")
def test_gradient_equals_finite_differences(width):
    x = torch.randn(2, width, dtype=torch.float64).mul(2)
    direction, upstream = torch.randn_like(x), torch.randn_like(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_rank(leaf, epsilon=0.6), leaf, upstream)
    step = 1e-7
    ends = (soft_rank(x + s * direction, epsilon=0.6) for s in (step, -step))
    slope = ((next(ends) - next(ends)) * upstream).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([0.01, 0.3, 1.0, 10.0]))
def test_properties(width, seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, width, generator=generator, dtype=torch.float64)
    permutation = torch.randperm(width, generator=generator)
    for name in set(BACKENDS) & {"reference", "cpu"}:
        ranks = soft_rank(x, epsilon=epsilon, backend=name)
        assert (ranks >= 1 - 1e-9).all()
        assert (ranks <= width + 1e-9).all()
        torch.testing.assert_close(ranks.sum(-1), torch.full((2,), width * (width + 1) / 2, dtype=torch.float64))
        torch.testing.assert_close(soft_rank(x[:, permutation], epsilon=epsilon, backend=name), ranks[:, permutation])
        torch.testing.assert_close(soft_rank(3 * x, epsilon=3 * epsilon, backend=name), ranks)
        torch.testing.assert_close(width + 1 - soft_rank(-x, epsilon=epsilon, backend=name), ranks)
        assert (ranks.gather(1, x.argsort(1)).diff(dim=1) >= -1e-12).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (0, 0), (2, 0, 3)], ids=str)
def test_empty_dimensions(shape, backend):
    x = torch.zeros(shape, requires_grad=True)
    ranks = soft_rank(x)
    assert ranks.shape == shape
    assert torch.autograd.grad(ranks.sum(), x)[0].shape == shape


@pytest.mark.parametrize("name", [name for name in WIDEST if name in BACKENDS])
def test_rows_beyond_the_widest_are_refused(name):
    x = torch.randn(2, WIDEST[name] + 1)
    with pytest.raises(BackendUnavailable, match=rf"soft_rank: backend '{name}': .*{x.shape[1]}.*usable here"):
        soft_rank(x, backend=name)


X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: soft_rank(X, epsilon=0), ValueError, "epsilon must be at least 1.17549e-38, got 0"),
        (lambda: soft_rank(X, epsilon=1e-300), ValueError, "epsilon must be at least"),
        (lambda: soft_rank(X, epsilon=1e300), ValueError, "epsilon must be at most"),
        (lambda: soft_rank(X, epsilon=float("nan")), ValueError, "epsilon must be finite"),
        (lambda: soft_rank(X, epsilon="1"), TypeError, "epsilon must be a number"),
        (lambda: soft_rank(X.long()), TypeError, "values must be one of .*got torch.int64"),
        (lambda: soft_rank(X[0, 0]), ValueError, r"values must be \[..., n\], got \(\)"),
        (lambda: soft_rank([1.0, 2.0]), TypeError, "values must be a tensor"),
        (lambda: soft_rank(X, torch.ones(2)), TypeError, "lengths must be one of torch.int32, torch.int64"),
        (lambda: soft_rank(X, torch.ones(3).long()), ValueError, r"lengths must be \[...\].*\(2,\) here, got \(3,\)"),
        (lambda: soft_rank(X, 2), TypeError, "lengths must be a tensor"),
        (lambda: soft_rank(X, torch.ones(2, device="meta").long()), ValueError, "values on cpu, lengths on meta"),
        (lambda: soft_rank(X, None, 1.0), TypeError, "positional"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
