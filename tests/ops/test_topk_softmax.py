import pytest
import torch

from mlot_kernels import Logits, Rows, rank_truncate, topk_softmax
from tests.conftest import backends_of
from tests.properties import given, st

on_every_backend = pytest.mark.parametrize("backend", backends_of("topk_softmax"))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12))


@given(shapes, st.data())
def test_equals_log_softmax_and_a_full_stable_sort(shape, data):
    B, T, V = shape
    flags = st.lists(st.booleans(), min_size=T, max_size=T)
    rows = Rows.from_mask(torch.tensor(data.draw(st.lists(flags, min_size=B, max_size=B))))
    x = torch.randn(shape, dtype=torch.float64).mul(data.draw(st.sampled_from((1, 3)))).round(decimals=1)  # some ties
    k = data.draw(st.integers(1, V))
    temperature = data.draw(st.floats(0.2, 5))
    top = topk_softmax(Logits(x, rows, temperature), k)
    assert top.columns.shape == (B, T, k)
    for b in range(B):
        n = int(rows.count[b])
        row = x[b, rows.index[b, :n]]
        expected = (row / temperature).log_softmax(-1)
        columns = row.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(top.columns[b, :n], columns)
        torch.testing.assert_close(top.log_probabilities[b, :n], expected.gather(1, columns))
        torch.testing.assert_close(top.lse[b, :n], (row / temperature).logsumexp(-1))
        assert all((output[b, n:] == 0).all() for output in top)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_torchs_topk(dtype):
    x = torch.randn(2, 3, 50).to(dtype)
    top = topk_softmax(x, 7)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    torch.testing.assert_close(top.log_probabilities, wide.log_softmax(-1).topk(7).values)
    assert torch.equal(x.gather(2, top.columns), x.topk(7).values)
    assert (top.log_probabilities.dtype, top.columns.dtype, top.lse.dtype) == (wide.dtype, torch.int64, wide.dtype)


def test_ranks_as_rank_truncate_does_each_token_by_itself():
    logits = Logits(torch.randn(2, 3, 40), temperature=2.0, standardize=True, log_scale=-torch.rand(2, 3))
    top, ranked = topk_softmax(logits, 6), rank_truncate(logits, k=6, scope="token")
    assert torch.equal(top.columns, ranked.columns)
    torch.testing.assert_close(top.log_probabilities, ranked.log_probabilities[0])


def test_every_field_of_logits():
    x = torch.randn(2, 3, 14, dtype=torch.float64)
    scale = -torch.rand(2, 3, dtype=torch.float64)
    columns = torch.arange(14) % 3 > 0
    top = topk_softmax(Logits(x, None, 0.7, True, 11, columns, scale), 4)
    z = x[..., :11] / (0.7 * (x[..., :11].std(-1, keepdim=True) + 1e-4))
    best = z.masked_fill(~columns[:11], float("-inf")).topk(4)
    assert torch.equal(top.columns, best.indices)
    torch.testing.assert_close(top.lse, z.logsumexp(-1))
    torch.testing.assert_close(top.log_probabilities, best.values - top.lse[..., None] + scale[..., None])


@on_every_backend
def test_equal_logits_stand_in_the_order_of_their_columns(backend):
    x = torch.zeros(1, 3, 300)
    x[0, 1, 4] = 1
    x[0, 2, ::2] = -0.0  # equal to 0
    assert topk_softmax(x, 4, backend=backend).columns.tolist() == [[[0, 1, 2, 3], [4, 0, 1, 2], [0, 1, 2, 3]]]


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_equals_than_there_is_room_for(dtype, backend):
    """A few larger ones, many equal to the k-th, in rows where either end of the numbers is met."""
    x = torch.randint(0, 2, (1, 5, 700)).to(dtype)
    x[0, 0, ::70] = 2
    x[0, 1] = float("inf")
    x[0, 2] = float("-inf")
    x[0, 3] = torch.finfo(dtype).min
    x[0, 3, 600] = 0
    x[0, 4] = float("nan")
    mask = torch.arange(700) % 3 > 0
    for columns in (None, mask):
        values = x if columns is None else x.masked_fill(~columns, float("-inf"))
        order = values.sort(dim=-1, descending=True, stable=True).indices
        if columns is not None:  # those left out come behind -inf
            order = order.gather(2, (~mask[order]).to(torch.uint8).argsort(dim=-1, stable=True))
        ours = topk_softmax(Logits(x, columns=columns), 12, backend=backend).columns
        assert torch.equal(ours[:, :4], order[:, :4, :12])
        assert ((ours[:, 4] >= 0) & (ours[:, 4] < 700)).all(), "of NaN they mean nothing, but are columns"


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_of_equals_and_others_are_ranked_as_by_a_sort(dtype, backend):
    """Rows of many more columns than candidates have room: few reach a threshold, or thousands do."""
    x = torch.randn(1, 4, 6000).to(dtype)
    x[0, 1] = 1
    x[0, 2] = x[0, 2].clamp(max=0)
    x[0, 3, 100:] = float("-inf")
    for columns in (None, torch.arange(6000) % 5 > 3, torch.arange(6000) >= 5990):
        values = x if columns is None else x.masked_fill(~columns, float("-inf"))
        order = values.sort(dim=-1, descending=True, stable=True).indices
        if columns is not None:  # those left out come behind -inf
            order = order.gather(2, (~columns[order]).to(torch.uint8).argsort(dim=-1, stable=True))
        top = topk_softmax(Logits(x, columns=columns), 20, backend=backend)
        assert torch.equal(top.columns, order[..., :20])


def test_logits_whose_probabilities_are_rounded_to_one_keep_their_order():
    x = torch.tensor([[1.0, 1.0 + 2**-23, -1.0, 1e-30]])
    top = topk_softmax(Logits(x, temperature=100.0), 4)
    assert top.columns.tolist() == [[1, 0, 3, 2]]


@pytest.mark.parametrize("standardize", [False, True])
def test_gradients_are_those_of_torch(standardize):
    x = (torch.randn(2, 3, 12, dtype=torch.float64) + 5).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    top = topk_softmax(Logits(x, temperature=1.5, standardize=standardize), 4)
    z = twin / (1.5 * (twin.std(-1, keepdim=True) + 1e-4 if standardize else 1))
    expected = z.log_softmax(-1).topk(4).values, z.logsumexp(-1)
    weights = [torch.randn_like(y) for y in expected]
    for ours, theirs in zip(((top.log_probabilities,), (top.lse,)), ((expected[0],), (expected[1],)), strict=True):
        weight = torch.randn_like(theirs[0])
        torch.testing.assert_close(
            torch.autograd.grad(ours, x, weight, retain_graph=True),
            torch.autograd.grad(theirs, twin, weight, retain_graph=True),
        )
    torch.testing.assert_close(
        torch.autograd.grad((top.log_probabilities, top.lse), x, weights), torch.autograd.grad(expected, twin, weights)
    )


def test_columns_left_out_come_last_even_behind_minus_infinity():
    x = torch.tensor([[3.0, 1.0, float("-inf"), 2.0, 4.0]])
    top = topk_softmax(Logits(x, columns=torch.tensor([False, True, True, True, False])), 5)
    assert top.columns.tolist() == [[3, 1, 2, 0, 4]]
    torch.testing.assert_close(top.log_probabilities[0, :2], x[0].log_softmax(-1)[[3, 1]])
    assert (top.log_probabilities[0, 2:] == float("-inf")).all()
    torch.testing.assert_close(top.lse, x.logsumexp(-1))


def test_infinitely_unlikely_columns_can_be_kept_without_harm():
    x = torch.randn(1, 3, 5)
    x[..., 1:] = float("-inf")
    x.requires_grad_()
    top = topk_softmax(x, 3)
    top.log_probabilities.exp().sum().backward()
    assert (top.columns == torch.tensor([0, 1, 2])).all()
    assert (x.grad == 0).all()


def test_a_nan_reaches_all_outputs_of_its_row():
    x = torch.randn(2, 3, 8)
    x[0, 1, 5] = float("nan")
    for columns in (None, torch.arange(8) != 5, torch.arange(8) == 5):
        top = topk_softmax(Logits(x, columns=columns), 4)
        bad = torch.tensor([[False, True, False], [False] * 3])
        assert torch.equal(top.lse.isnan(), bad)
        assert torch.equal(top.log_probabilities.isnan(), bad[..., None].expand(-1, -1, 4))
        assert ((top.columns >= 0) & (top.columns < 8)).all()


def test_a_row_without_any_column_is_undefined_and_shows_it():
    top = topk_softmax(torch.full((1, 1, 4), float("-inf")), 2)
    assert top.log_probabilities.isnan().all()
    assert top.lse.isnan().all()


def test_a_large_maximum_does_not_swallow_the_normaliser():
    x = torch.tensor([[3e6, 3e6, 3e6 - 1]])
    torch.testing.assert_close(topk_softmax(x, 3).log_probabilities, (x - 3e6).log_softmax(-1))


@given(st.integers(0, 10_000))
def test_permuting_the_vocabulary_permutes_the_columns(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 20, dtype=torch.float64, generator=generator)
    order = torch.randperm(20, generator=generator)
    plain, permuted = topk_softmax(x, 6), topk_softmax(x[..., order].contiguous(), 6)
    assert torch.equal(order[permuted.columns], plain.columns)
    torch.testing.assert_close(permuted.log_probabilities, plain.log_probabilities)
    torch.testing.assert_close(permuted.lse, plain.lse)


@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-50, 50))
def test_scaling_and_shifting_move_the_normaliser_alone(seed, factor, shift):
    x = torch.randn(2, 3, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain, moved = topk_softmax(x, 5), topk_softmax(Logits(x * factor + shift, temperature=factor), 5)
    assert torch.equal(moved.columns, plain.columns)
    torch.testing.assert_close(moved.log_probabilities, plain.log_probabilities)
    torch.testing.assert_close(moved.lse, plain.lse + shift / factor)


def test_one_sequence_loses_its_batch_dimension():
    x = torch.randn(4, 9)
    flat, batched = topk_softmax(x, 3), topk_softmax(x[None], 3)
    for ours, expected in zip(flat, batched, strict=True):
        assert torch.equal(ours, expected[0])


def test_nothing_counted_gives_zeros_and_a_zero_gradient():
    x = torch.full((2, 3, 4), float("nan"), requires_grad=True)
    top = topk_softmax(Logits(x, Rows.from_mask(torch.zeros(2, 3, dtype=torch.bool))), 2)
    (top.log_probabilities.sum() + top.lse.sum()).backward()
    assert all((output == 0).all() for output in top)
    assert (x.grad == 0).all()


def test_gradients_have_their_inputs_dtypes_and_columns_have_none():
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    top = topk_softmax(Logits(x, log_scale=scale), 2)
    (top.log_probabilities.sum() + top.lse.sum()).backward()
    assert (x.grad.dtype, scale.grad.dtype) == (torch.bfloat16, torch.float16)
    assert (scale.grad == 2).all(), "lse is that of the logits: the log scale is not in it"
    assert not top.columns.requires_grad


X = torch.randn(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: topk_softmax(X, 0), ValueError, "k must be at least 1 and at most 5"),
        (lambda: topk_softmax(X, 6), ValueError, r"k must be .* at most 5 \(the vocabulary's size\), got 6"),
        (lambda: topk_softmax(Logits(X, vocab_size=3), 4), ValueError, "at most 3"),
        (lambda: topk_softmax(X, 2.0), TypeError, "k must be an int, got 2.0"),
        (lambda: topk_softmax(X, True), TypeError, "k must be an int, got True"),
        (lambda: topk_softmax(X), TypeError, "k"),
        (lambda: topk_softmax(X, 2, largest=False), TypeError, "largest"),
        (lambda: topk_softmax("X", 2), TypeError, "logits must be a tensor or Logits, got str"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
