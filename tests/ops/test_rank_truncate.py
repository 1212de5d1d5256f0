import pytest
import torch

from mlot_kernels import Logits, Rows, gather_columns, rank_truncate
from tests.conftest import backends_of
from tests.properties import given, st

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 12))


@given(shapes, st.data())
def test_equals_a_full_argsort(shape, data):
    x = torch.randn(shape, dtype=torch.float64)
    rows = Rows.from_mask(
        torch.tensor(
            data.draw(
                st.lists(
                    st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
                )
            )
        )
    )
    k = data.draw(st.integers(1, shape[2]))
    counted = torch.stack([(rows.index == t).any(1) for t in range(shape[1])], 1)  # [B, T]
    p = x.softmax(-1).masked_fill(~counted[..., None], 0)
    weights = {"sequence": p.sum(1), "batch": p.sum((0, 1)).expand(shape[0], -1)}
    for scope, weight in weights.items():
        ranked = rank_truncate(Logits(x, rows), k=k, scope=scope)
        assert torch.equal(ranked.columns, weight.argsort(dim=-1, descending=True, stable=True)[:, :k])
        for b in range(shape[0]):
            n = int(rows.count[b])
            expected = x[b, rows.index[b, :n]].log_softmax(-1)[:, ranked.columns[b]]
            torch.testing.assert_close(ranked.log_probabilities[0, b, :n], expected)
            torch.testing.assert_close(ranked.kept_mass[b, :n], expected.exp().sum(-1))
            assert (ranked.log_probabilities[0, b, n:] == 0).all()
            assert (ranked.kept_mass[b, n:] == 0).all()


def test_each_token_by_itself_is_topk():
    x = torch.randn(2, 3, 50)
    ranked = rank_truncate(x, k=7, scope="token")
    top = x.log_softmax(-1).topk(7)
    torch.testing.assert_close(ranked.log_probabilities[0], top.values)
    assert torch.equal(ranked.columns, top.indices)


def test_further_temperatures_are_absolute_and_do_not_rank():
    x = torch.randn(1, 4, 30) * 4
    ranked = rank_truncate(Logits(x, temperature=0.5), k=5, also_at=(1.0, 4.0))
    assert ranked.log_probabilities.shape == (3, 1, 4, 5)
    assert torch.equal(ranked.columns, rank_truncate(Logits(x, temperature=0.5), k=5).columns)
    for r, temperature in enumerate((0.5, 1.0, 4.0)):
        expected = (x / temperature).log_softmax(-1)[:, :, ranked.columns[0]]
        torch.testing.assert_close(ranked.log_probabilities[r], expected)


def test_equal_sums_stand_in_the_order_of_their_columns():
    x = torch.zeros(2, 3, 9)
    x[1, :, 4] = 1
    assert rank_truncate(x, k=4).columns.tolist() == [[0, 1, 2, 3], [4, 0, 1, 2]]
    assert rank_truncate(x, k=3, scope="token").columns[1, 0].tolist() == [4, 0, 1]


@pytest.mark.parametrize("backend", backends_of("rank_truncate"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [7, 300])
def test_many_ties_stand_in_the_order_of_their_columns(backend, dtype, k):
    """Equal logits are equal sums, to the bit, whichever threads make them; the k-th is one of many."""
    x = torch.randn(1, 1, 1003).mul(2).round().to(dtype).expand(1, 3, -1).contiguous()
    looked_at = torch.arange(1003) % 3 > 0
    expected = x[0, 0].masked_fill(~looked_at, float("-inf")).argsort(descending=True, stable=True)[:k]
    for scope in ("sequence", "token"):
        ranked = rank_truncate(Logits(x, columns=looked_at), k=k, scope=scope, backend=backend)
        assert (ranked.columns == expected).all()


def test_columns_left_out_come_last_with_probability_zero():
    x = torch.randn(1, 2, 6)
    columns = torch.tensor([False, True, False, True, False, False])
    ranked = rank_truncate(Logits(x, columns=columns), k=4)
    assert set(ranked.columns[0, :2].tolist()) == {1, 3}
    assert (ranked.log_probabilities[0, 0, :, 2:] == float("-inf")).all()
    torch.testing.assert_close(ranked.kept_mass, x.softmax(-1)[..., [1, 3]].sum(-1))


def test_infinitely_unlikely_columns_can_be_kept_without_harm():
    x = torch.randn(1, 3, 5)
    x[..., 1:] = float("-inf")
    x.requires_grad_()
    ranked = rank_truncate(x, k=3)
    ranked.log_probabilities.exp().sum().backward()
    assert ranked.columns.tolist() == [[0, 1, 2]]
    assert (x.grad == 0).all()


def test_a_nan_reaches_all_that_was_ranked_with_it():
    x = torch.randn(2, 3, 8)
    x[0, 1, 5] = float("nan")
    nans = {
        scope: rank_truncate(x, k=2, scope=scope).log_probabilities[0].isnan().all(-1)
        for scope in ("sequence", "batch", "token")
    }
    assert nans["sequence"].tolist() == [[True] * 3, [False] * 3]
    assert nans["batch"].all()
    assert nans["token"].tolist() == [[False, True, False], [False] * 3]


@given(st.integers(0, 10_000))
def test_permuting_the_vocabulary_permutes_the_columns(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 20, dtype=torch.float64, generator=generator)
    order = torch.randperm(20, generator=generator)
    plain, permuted = rank_truncate(x, k=6), rank_truncate(x[..., order].contiguous(), k=6)
    assert torch.equal(order[permuted.columns], plain.columns)
    torch.testing.assert_close(permuted.log_probabilities, plain.log_probabilities)


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_padding_and_splitting_a_batch_change_nothing(seed, padding):
    x = torch.randn(3, 4, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = Rows.every(3, 4)
    whole = rank_truncate(Logits(x, rows), k=5)
    padded = torch.cat((torch.full((3, padding, 15), float("nan")), x), 1)
    behind = rank_truncate(
        Logits(padded, Rows.from_lengths(torch.full((3,), padding), torch.full((3,), 4), 4 + padding)), k=5
    )
    assert torch.equal(behind.columns, whole.columns)
    torch.testing.assert_close(behind.log_probabilities[:, :, :4], whole.log_probabilities)
    for b in range(3):
        torch.testing.assert_close(rank_truncate(x[b], k=5).log_probabilities, whole.log_probabilities[:, b])


def test_gathering_the_ranked_columns_gives_the_ranked():
    x = torch.randn(2, 3, 10)
    for scope in ("sequence", "token"):
        ranked = rank_truncate(x, k=4, scope=scope, also_at=(2.0,))
        gathered = gather_columns(x, ranked.columns, also_at=(2.0,))
        for a, b in zip(ranked, gathered, strict=True):
            assert torch.equal(a, b)


def test_a_column_that_does_not_exist_gives_nan():
    gathered = gather_columns(Logits(torch.randn(1, 2, 5), vocab_size=4), torch.tensor([[0, 4, -1]]))
    assert gathered.log_probabilities[0, 0].isnan().tolist() == [[False, True, True]] * 2


X = torch.randn(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rank_truncate(X, k=0), ValueError, "k must be at least 1 and at most 5"),
        (lambda: rank_truncate(X, k=6), ValueError, r"k must be .* at most 5 \(the vocabulary's size\), got 6"),
        (lambda: rank_truncate(Logits(X, vocab_size=3), k=4), ValueError, "at most 3"),
        (lambda: rank_truncate(X, k=2.0), TypeError, "k must be an int, got 2.0"),
        (lambda: rank_truncate(X, k=2, scope="all"), ValueError, "scope must be one of 'sequence', 'batch', 'token'"),
        (lambda: rank_truncate(X, k=2, also_at=(1.0, -1)), ValueError, r"also_at\[1\] must be above 0, got -1"),
        (lambda: rank_truncate(X, k=2, also_at=2.0), TypeError, "also_at must be a sequence of temperatures"),
        (lambda: rank_truncate(X, k=2, top=3), TypeError, "top"),
        (lambda: gather_columns(X, torch.zeros(2, 2)), TypeError, "columns must be one of torch.int64"),
        (
            lambda: gather_columns(X, torch.zeros(3, 2).long()),
            ValueError,
            r"columns must be .*\(2, 2\) here",
        ),
        (lambda: gather_columns(X, torch.zeros(2, 0).long()), ValueError, "the number of columns must be at least 1"),
        (lambda: gather_columns(X[0], torch.zeros(1, 3, 2).long()), ValueError, r"columns must be \[k\] or \[A, k\]"),
        (lambda: gather_columns(X, torch.zeros(2, 2).long().to("meta")), ValueError, "logits on cpu, columns on meta"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("standardize", [False, True])
def test_a_kept_column_at_minus_infinity_passes_its_gradient_on(standardize):
    x = torch.randn(1, 2, 9, dtype=torch.float64) + 3
    x[..., 6:] = float("-inf")
    ours, by_hand = x.clone().requires_grad_(), x[..., :6].clone().requires_grad_()
    gathered = gather_columns(Logits(ours, standardize=standardize), torch.tensor([[7, 2]])).log_probabilities[0]
    scaled = by_hand / (by_hand.std(-1, keepdim=True) + 1e-4) if standardize else by_hand
    assert (gathered[..., 0] == float("-inf")).all()
    torch.autograd.backward(gathered, torch.ones_like(gathered))
    # d log p_7 is that of minus the log of the normaliser: the -inf stays what it is
    (scaled[..., 2] - 2 * scaled.logsumexp(-1)).sum().backward()
    torch.testing.assert_close(ours.grad[..., :6], by_hand.grad)
    assert (ours.grad[..., 6:] == 0).all()


def test_a_large_log_scale_is_no_nan():
    ranked = rank_truncate(Logits(torch.randn(1, 3, 7), log_scale=torch.full((1, 3), 100.0)), k=2)
    assert ranked.log_probabilities.isfinite().all()
