import pytest
import torch

from mlot_kernels import Logits, Rows, row_entropy
from mlot_kernels.logits import log_probabilities, prepare


def log_p(values: torch.Tensor, **fields) -> torch.Tensor:
    return log_probabilities(*prepare(Logits(values, **fields)).side)


def test_temperature_and_standard_deviation_are_torchs():
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    expected = (x / (2 * (x.std(-1, keepdim=True) + 1e-4))).log_softmax(-1)
    torch.testing.assert_close(log_p(x, temperature=2, standardize=True), expected)


def test_the_vocabulary_ends_the_distribution_and_columns_do_not():
    x = torch.randn(1, 2, 10, dtype=torch.float64)
    torch.testing.assert_close(log_p(x, vocab_size=7), x[..., :7].log_softmax(-1))
    kept = torch.arange(10) < 4
    chosen = log_p(x, columns=kept)
    torch.testing.assert_close(chosen[..., :4], x.log_softmax(-1)[..., :4])
    assert (chosen[..., 4:] == float("-inf")).all()


@pytest.mark.parametrize("standardize", [False, True])
def test_minus_infinity_is_a_column_that_is_not_there(standardize):
    x = torch.randn(1, 3, 12, dtype=torch.float64)
    x[..., 8:] = float("-inf")
    x.requires_grad_()
    narrow = x.detach()[..., :8].clone().requires_grad_()
    ours, expected = (log_p(v, standardize=standardize)[..., :8] for v in (x, narrow))
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad[..., :8], narrow.grad)
    assert (x.grad[..., 8:] == 0).all()


def test_a_row_without_any_column_is_undefined_and_shows_it():
    assert row_entropy(torch.full((1, 1, 4), float("-inf"))).isnan().all()


def test_the_log_scale_adds():
    x, scale = torch.randn(2, 3, 5), torch.randn(2, 3)
    torch.testing.assert_close(log_p(x, log_scale=scale), x.log_softmax(-1) + scale[..., None])


def test_one_sequence_loses_its_batch_dimension():
    x = torch.randn(4, 9)
    rows = Rows.from_mask(torch.tensor([[True, False, True, True]]))
    scale = torch.randn(4)
    flat = row_entropy(Logits(x, rows, log_scale=scale))
    batched = row_entropy(Logits(x[None], rows, log_scale=scale[None]))
    assert flat.shape == (4,)
    torch.testing.assert_close(flat, batched[0])


X = torch.randn(2, 3, 5)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"values": [1.0]}, TypeError, r"logits.values must be a tensor \[B, T, V\] or \[N, V\], got list"),
        ({"values": X.long()}, TypeError, r"logits.values must be one of .*got torch.int64; call .float\(\)"),
        ({"values": X[0, 0]}, ValueError, r"logits.values must be \[B, T, V\] or \[N, V\], got \(5,\)"),
        ({"values": X[..., :0]}, ValueError, "at least one column"),
        ({"values": X.transpose(1, 2)}, ValueError, r"must be contiguous, got strides .*; call .contiguous\(\)"),
        ({"values": X.to_sparse()}, TypeError, r"must be dense.*to_dense"),
        ({"rows": torch.ones(2, 3)}, TypeError, "rows must be Rows, got Tensor; make them with Rows.from_labels"),
        ({"rows": Rows.every(3, 3)}, ValueError, r"rows.index must be \[B, A\] for values of B sequences, \(2, 3\)"),
        ({"rows": Rows.every(2, 3, "meta")}, ValueError, "one device, got logits.values on cpu, logits.rows on meta"),
        ({"rows": Rows.every(2, 4)}, ValueError, "rows are rows of sequences of 4 positions, but logits.values have 3"),
        ({"temperature": 0}, ValueError, "temperature must be above 0, got 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"temperature": torch.tensor(2.0)}, TypeError, "must be a Python number, got a tensor"),
        ({"standardize": 1}, TypeError, "standardize must be True or False, got 1"),
        ({"vocab_size": 6}, ValueError, r"vocab_size must be at least 1 and at most 5 \(the width of values\), got 6"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1"),
        ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int, got 2.0"),
        ({"columns": torch.ones(5)}, TypeError, "columns must be one of torch.bool, got torch.float32"),
        (
            {"columns": torch.ones(4, dtype=torch.bool)},
            ValueError,
            r"must be \[V\] as values, \(5,\) here, got \(4,\)",
        ),
        ({"log_scale": torch.ones(3)}, ValueError, r"log_scale must be \[B, A\], got \(3,\)"),
        (
            {"log_scale": torch.ones(2, 4)},
            ValueError,
            r"must be \[B, A\] as its rows, \(2, 3\) here",
        ),
        ({"heat": 2}, TypeError, "heat"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(fields, error, words):
    with pytest.raises(error, match=words):
        row_entropy(Logits(**{"values": X, **fields}))


def test_other_types_are_named():
    with pytest.raises(TypeError, match="logits must be a tensor or Logits, got str"):
        row_entropy("logits")
