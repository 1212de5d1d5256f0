import pytest
import torch

from mlot_kernels import Logits, Rows, token_log_probability
from tests.properties import given, st

NOT_A_TOKEN = torch.iinfo(torch.int64).min
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 12))


@given(shapes, st.data())
def test_equals_log_softmax_and_gather(shape, data):
    B, T, V = shape
    flags = st.lists(st.booleans(), min_size=T, max_size=T)
    rows = Rows.from_mask(torch.tensor(data.draw(st.lists(flags, min_size=B, max_size=B))))
    x = torch.randn(shape, dtype=torch.float64)
    tokens = torch.randint(V, (B, T)).masked_fill(~rows.counted, NOT_A_TOKEN)
    temperature = data.draw(st.floats(0.2, 5))
    ours = token_log_probability(Logits(x, rows, temperature), tokens)
    for b in range(B):
        n = int(rows.count[b])
        log_p = (x[b, rows.index[b, :n]] / temperature).log_softmax(-1)
        torch.testing.assert_close(ours[b, :n], log_p.gather(1, tokens[b, :n, None]).squeeze(1))
        assert (ours[b, n:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_the_cross_entropy_of_a_models_labels(dtype):
    x = torch.randn(2, 6, 30).to(dtype).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    labels = torch.randint(30, (2, 6))
    labels[:, :2] = -100
    labels[1, 4] = -100
    rows = Rows.from_labels(labels)
    ours = -token_log_probability(Logits(x, rows), labels.gather(1, rows.index + 1)).sum() / rows.count.sum()
    theirs = torch.nn.functional.cross_entropy(twin[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, check_dtype=False)
    torch.testing.assert_close(x.grad, twin.grad)


@given(st.integers(0, 10_000))
def test_permuting_the_vocabulary_permutes_the_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 20, dtype=torch.float64, generator=generator)
    tokens = torch.randint(20, (2, 3), generator=generator)
    order = torch.randperm(20, generator=generator)
    permuted = token_log_probability(Logits(x[..., order].contiguous(), standardize=True), order.argsort()[tokens])
    torch.testing.assert_close(permuted, token_log_probability(Logits(x, standardize=True), tokens))


def test_every_field_of_logits():
    x = torch.randn(2, 3, 14, dtype=torch.float64)
    scale = -torch.rand(2, 3, dtype=torch.float64)
    tokens = torch.randint(11, (2, 3))
    ours = token_log_probability(Logits(x, None, 0.7, True, 11, torch.ones(14, dtype=torch.bool), scale), tokens)
    kept = x[..., :11]
    log_p = (kept / (0.7 * (kept.std(-1, keepdim=True) + 1e-4))).log_softmax(-1) + scale[..., None]
    torch.testing.assert_close(ours, log_p.gather(2, tokens[..., None]).squeeze(2))


def test_one_sequence_loses_its_batch_dimension():
    x, tokens = torch.randn(4, 9), torch.tensor([0, 8, 3, 3])
    flat = token_log_probability(x, tokens)
    assert flat.shape == (4,)
    torch.testing.assert_close(flat, token_log_probability(x[None], tokens[None])[0])


def test_a_token_that_does_not_exist_gives_nan_and_no_gradient():
    x = torch.randn(1, 4, 5, requires_grad=True)
    ours = token_log_probability(Logits(x, vocab_size=4), torch.tensor([[0, 4, -1, NOT_A_TOKEN]]))
    ours.sum().backward()
    assert ours[0].isnan().tolist() == [False, True, True, True]
    assert (x.grad[0, 0, :4] != 0).all()
    assert (x.grad[0, 1:] == 0).all()


def test_a_token_that_is_left_out_has_probability_zero_and_no_gradient():
    x = torch.randn(1, 3, 4)
    x[0, 2, 0] = float("nan")
    x.requires_grad_()
    scale = torch.zeros(1, 3, requires_grad=True)
    columns = torch.tensor([True, False, True, True])
    ours = token_log_probability(Logits(x, columns=columns, log_scale=scale), torch.tensor([[0, 1, 1]]))
    ours[:, :2].sum().backward()
    torch.testing.assert_close(ours[0, 0], x[0, 0].log_softmax(-1)[0])
    assert ours[0, 1] == float("-inf")
    assert (x.grad[0, 1] == 0).all()
    assert scale.grad.tolist() == [[1, 0, 0]]
    assert ours[0, 2].isnan(), "a NaN in the row shows at a token that is left out, too"


@pytest.mark.parametrize("standardize", [False, True])
def test_an_infinitely_unlikely_token_has_log_softmaxs_gradient(standardize):
    x = torch.randn(1, 1, 9, dtype=torch.float64) + 3
    x[..., 6:] = float("-inf")
    x.requires_grad_()
    token_log_probability(Logits(x, standardize=standardize), torch.tensor([[7]])).sum().backward()

    narrow = x.detach()[..., :6].clone().requires_grad_()
    scale = narrow.std() + 1e-4 if standardize else 1
    (-(narrow / scale).logsumexp(-1)).sum().backward()  # log p = -inf - lse
    torch.testing.assert_close(x.grad[..., :6], narrow.grad)
    assert (x.grad[..., 6:] == 0).all()


def test_a_nan_shows_in_its_row_only():
    x = torch.randn(2, 3, 8)
    x[0, 1, 5] = float("nan")
    ours = token_log_probability(x, torch.zeros(2, 3, dtype=torch.int64))
    assert ours.isnan().tolist() == [[False, True, False], [False] * 3]


def test_a_row_without_any_column_is_undefined_and_shows_it():
    assert token_log_probability(torch.full((1, 1, 4), float("-inf")), torch.tensor([[2]])).isnan().all()


def test_nothing_counted_gives_zeros_and_a_zero_gradient():
    x = torch.full((2, 3, 4), float("nan"), requires_grad=True)
    rows = Rows.from_mask(torch.zeros(2, 3, dtype=torch.bool))
    ours = token_log_probability(Logits(x, rows), torch.full((2, 3), NOT_A_TOKEN))
    ours.sum().backward()
    assert (ours == 0).all()
    assert (x.grad == 0).all()


def test_gradients_have_their_inputs_dtypes():
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    ours = token_log_probability(Logits(x, log_scale=scale), torch.ones(2, 3, dtype=torch.int64))
    ours.sum().backward()
    assert (ours.dtype, x.grad.dtype, scale.grad.dtype) == (torch.float32, torch.bfloat16, torch.float16)


X = torch.randn(2, 3, 5)
TOKENS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: token_log_probability(X, [[0]]), TypeError, r"tokens must be a tensor \[B, A\], got list"),
        (
            lambda: token_log_probability(X, TOKENS.int()),
            TypeError,
            "tokens must be one of torch.int64, got torch.int32",
        ),
        (lambda: token_log_probability(X, TOKENS[0]), ValueError, r"tokens must be \[B, A\], got \(3,\)"),
        (
            lambda: token_log_probability(X, TOKENS[:, :2]),
            ValueError,
            r"tokens must be \[B, A\] as the rows, \(2, 3\) here, got \(2, 2\)",
        ),
        (lambda: token_log_probability(X[0], TOKENS[:1]), ValueError, r"tokens must be \[A\], got \(1, 3\)"),
        (lambda: token_log_probability(X[0], TOKENS[0, :2]), ValueError, r"\[A\] as the rows, \(3,\) here, got \(2,\)"),
        (lambda: token_log_probability(X, TOKENS.to("meta")), ValueError, "logits on cpu, tokens on meta"),
        (lambda: token_log_probability(X, TOKENS, labels=TOKENS), TypeError, "labels"),
        (lambda: token_log_probability("X", TOKENS), TypeError, "logits must be a tensor or Logits, got str"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
