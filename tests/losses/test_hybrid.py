import pytest
import torch

from mlot_kernels import HybridLoss, hybrid_loss, merge_groups, shared_tokens
from mlot_kernels.merging import STRATEGIES
from tests import gold
from tests.dispatch_modes import Allocations, NoHostSync
from tests.losses.examples import value_and_gradient
from tests.test_merging import aligned


def merged(batch: gold.Batch, strategy: str = "observed"):
    return merge_groups(aligned(batch), batch.student_ids, batch.teacher_ids, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_is_the_loop_over_groups(strategy, beta):
    for seed, weights in enumerate([None, (0.25, 2.0)]):
        batch = gold.batch(seed, starts=(0, 3))
        temperatures = (1.5, 0.8)
        options = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
        if weights is not None:
            options |= {"matched_weight": weights[0], "unmatched_weight": weights[1]}
        ours = value_and_gradient(
            hybrid_loss,
            *batch[:2],
            column_pairs=batch.column_pairs,
            alignment=merged(batch, strategy),
            beta=beta,
            reduction="none",
            **options,
        )
        expected = value_and_gradient(
            lambda own: gold.hybrid(batch._replace(student=own), strategy, beta, weights, temperatures=temperatures),  # noqa: B023
            batch.student,
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_probabilities_below_the_least_count_as_it():
    batch = gold.batch(3)
    batch = batch._replace(student=batch.student * 8, teacher=batch.teacher * 6)
    assert (batch.student.softmax(-1) < 1e-8).any()
    options = {"column_pairs": batch.column_pairs, "alignment": merged(batch), "reduction": "none"}
    ours = value_and_gradient(hybrid_loss, *batch[:2], **options)
    expected = value_and_gradient(lambda own: gold.hybrid(batch._replace(student=own), "observed", 0.5), batch.student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_by_position():
    batch = gold.batch(7, B=1)
    labels = batch.student_labels, batch.teacher_labels
    s, t = (
        logits[0, (side[0] != -100).nonzero().flatten() - 1].softmax(1)
        for logits, side in zip(batch[:2], labels, strict=True)
    )
    n = min(len(s), len(t))
    own, other = batch.column_pairs.unbind(1)
    rest_s = torch.ones(s.shape[1], dtype=torch.bool).index_fill(0, own, False)
    rest_t = torch.ones(t.shape[1], dtype=torch.bool).index_fill(0, other, False)
    matched = gold.divergence(t[:n, other], s[:n, own], 0.5).mean()
    unmatched = gold.sorted_distance(s[:n, rest_s], t[:n, rest_t]).mean()
    loss, parts = hybrid_loss(*batch[:2], *labels, column_pairs=batch.column_pairs, return_components=True)
    share = len(own) / t.shape[1]
    torch.testing.assert_close(loss, share * matched + (1 - share) * unmatched)
    torch.testing.assert_close(parts["matched"], matched)
    torch.testing.assert_close(parts["unmatched"], unmatched)
    assert parts["coverage"] == 1
    assert parts["rows"] == n
    assert parts.keys() == {"matched", "unmatched", "coverage", "rows"}


@pytest.mark.parametrize("shared", [0, 83])
def test_all_columns_or_none_are_matched(shared):
    batch = gold.batch(1, shared=shared)
    options = {"column_pairs": batch.column_pairs, "alignment": merged(batch), "reduction": "none"}
    ours = value_and_gradient(hybrid_loss, *batch[:2], **options)
    expected = value_and_gradient(lambda own: gold.hybrid(batch._replace(student=own), "observed", 0.5), batch.student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precisions_are_computed_in_float32(dtype):
    batch = gold.batch(2, dtype=dtype)
    options = {"column_pairs": batch.column_pairs, "alignment": merged(batch)}
    value, gradient = value_and_gradient(hybrid_loss, *batch[:2], **options)
    wide, wide_gradient = value_and_gradient(hybrid_loss, *(x.float() for x in batch[:2]), **options)
    torch.testing.assert_close(value, wide)
    # Three gradients, each rounded, and their sum, which is rounded twice.
    torch.testing.assert_close(gradient.float(), wide_gradient, atol=1e-5, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("aligns", [True, False])
def test_composes(aligns):
    batch = gold.batch(4, dtype=torch.float32)
    loss = HybridLoss(batch.column_pairs, beta=0.3)
    assert "column_pairs=(60, 2), beta=0.3" in repr(loss)
    assert loss.to("meta").options["column_pairs"].is_meta
    loss = HybridLoss(batch.column_pairs, beta=0.3)
    assert not loss.state_dict()
    labels = () if aligns else (batch.student_labels, batch.teacher_labels)
    options = {"alignment": merged(batch) if aligns else None, "token_weight": torch.rand(batch.student.shape[:2])}
    expected = value_and_gradient(loss, *batch[:2], *labels, **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ways = {
        "compile": lambda: value_and_gradient(compiled, *batch[:2], *labels, **options),
        "func": lambda: tuple(
            reversed(torch.func.grad_and_value(lambda own: loss(own, batch.teacher, *labels, **options))(batch.student))
        ),
        "checkpoint": lambda: value_and_gradient(
            lambda own: torch.utils.checkpoint.checkpoint(
                loss, own, batch.teacher, *labels, use_reentrant=False, **options
            ),
            batch.student,
        ),
    }
    for name, way in ways.items():
        for a, b in zip(way(), expected, strict=True):
            torch.testing.assert_close(a, b, msg=name)
    with NoHostSync():
        loss(*batch[:2], *labels, return_components=True, **options)


def test_backward_twice_and_both_sides():
    batch = gold.batch(4, dtype=torch.float32)
    student, teacher = (x.clone().requires_grad_() for x in batch[:2])
    options = {"column_pairs": batch.column_pairs, "alignment": merged(batch)}
    value = hybrid_loss(student, teacher, **options)
    first = torch.autograd.grad(value, (student, teacher), retain_graph=True)
    second = torch.autograd.grad(2 * value, (student, teacher))
    alone = torch.autograd.grad(hybrid_loss(student, batch.teacher, **options), student)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)
    torch.testing.assert_close(first[0], alone[0])


def test_gradients_of_both_sides_against_differences():
    batch = gold.batch(6, B=2, lengths=(8, 7), vocabularies=(9, 8), shared=4, starts=(1, 2))
    options = {"column_pairs": batch.column_pairs, "alignment": merged(batch, "bayesian")}
    inputs = tuple(x.clone().requires_grad_() for x in batch[:2])
    assert torch.autograd.gradcheck(lambda s, t: hybrid_loss(s, t, **options), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda s: hybrid_loss(s, batch.teacher, **options), inputs[:1], fast_mode=True)


def test_rows_that_do_not_count_are_not_read():
    batch = gold.batch(4, dtype=torch.float32)
    options = {"column_pairs": batch.column_pairs, "alignment": merged(batch)}
    expected = value_and_gradient(hybrid_loss, *batch[:2], **options)
    student, teacher = (
        x.masked_fill((labels == -100)[..., None], float("nan"))
        for x, labels in zip(batch[:2], (batch.student_labels, batch.teacher_labels), strict=True)
    )
    for a, b in zip(value_and_gradient(hybrid_loss, student, teacher, **options), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("aligns", [True, False])
def test_gradients_meet_in_one_tensor(aligns):
    batch = gold.batch(4, B=1, lengths=(160, 170), vocabularies=(2000, 1900), shared=900, dtype=torch.float32)
    student = batch.student.clone().requires_grad_()
    value = hybrid_loss(
        student, batch.teacher, column_pairs=batch.column_pairs, alignment=merged(batch) if aligns else None
    )
    gradient = student.numel() * 4
    with Allocations() as mode:
        value.backward()
    assert gradient <= mode.peak < 1.2 * gradient


class Tokenizer:
    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self):
        return {token: number for number, token in enumerate(self.tokens)}


def test_shared_tokens():
    student, teacher = Tokenizer("a", "b", "Ġc", "d", "e"), Tokenizer("x", "d", "▁c", "a", "b", "e")
    assert shared_tokens(student, teacher).tolist() == [[3, 1], [0, 3], [1, 4], [4, 5]]
    sizes = {"student_vocab_size": 4, "teacher_vocab_size": 4}
    assert shared_tokens(student, teacher, **sizes).tolist() == [[3, 1], [0, 3]]
    assert shared_tokens(student, Tokenizer("y")).shape == (0, 2)
    with pytest.raises(TypeError, match="teacher_tokenizer must have get_vocab"):
        shared_tokens(student, "gpt2")


BATCH = gold.batch(0, dtype=torch.float32)
PAIRS = BATCH.column_pairs


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"column_pairs": PAIRS[:, 0]}, ValueError, r"column_pairs must be \[P, 2\]"),
        ({"column_pairs": PAIRS.int()}, TypeError, "column_pairs must be one of torch.int64"),
        ({"beta": 1.5}, ValueError, "beta must be at most 1, got 1.5"),
        ({"matched_weight": 0.5}, ValueError, "must be given together or not at all, got 0.5 and None"),
        ({"student_temperature": 0}, ValueError, "student_temperature must be above 0"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"backend": "cublas"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input_is_named(options, error, words):
    options = {"column_pairs": PAIRS} | options
    with pytest.raises(error, match=words):
        hybrid_loss(*BATCH[:2], **options)
    with pytest.raises(error, match=words):
        HybridLoss(**options)
