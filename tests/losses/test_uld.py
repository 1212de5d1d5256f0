import pytest
import torch

from bench.baselines.uld import published_uld_loss
from mlot_kernels import Rows, ULDLoss, sorted_l1, uld_loss
from tests.dispatch_modes import NoHostSync
from tests.losses.examples import labels_of, logits_of, value_and_gradient


@pytest.mark.parametrize(("V_s", "V_t"), [(60, 60), (60, 45), (45, 60)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_published_code(V_s, V_t, dtype):
    student, teacher = logits_of(3, 12, V_s, dtype), logits_of(3, 15, V_t, dtype)
    labels = labels_of(12, (2, 5), (3, 7), (8, 3)), labels_of(15, (1, 6), (4, 4), (9, 5))
    options = {"student_temperature": 1.5, "teacher_temperature": 0.7}
    ours = value_and_gradient(uld_loss, student, teacher, *labels, **options)
    expected = value_and_gradient(published_uld_loss, student, teacher, *labels, **options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_several_spans_and_weights():
    student, teacher = logits_of(1, 9, 30), logits_of(1, 9, 40)
    labels = labels_of(9, (1, 2, 5, 3)), labels_of(9, (2, 3, 6, 2))
    each = sorted_l1(student[0, [0, 1, 4, 5]], teacher[0, [1, 2, 5, 6]])
    loss, parts = uld_loss(student, teacher, *labels, return_components=True)
    torch.testing.assert_close(loss, each.mean())
    torch.testing.assert_close(parts["sorted_l1"], loss)
    assert parts["rows"].item() == 4
    assert parts.keys() == {"sorted_l1", "tail_bound", "coverage", "rows"}
    weight = torch.arange(9.0)[None]
    weighted = uld_loss(student, teacher, *labels, token_weight=weight)
    used = weight[0, [0, 1, 4, 5]]
    torch.testing.assert_close(weighted, (used * each).sum() / used.sum())


def test_reductions_denominators_and_empty_answers():
    student, teacher = logits_of(3, 6, 20), logits_of(3, 6, 25)
    labels = labels_of(6, (1, 4), (2, 3), (0, 0))
    arguments = (student, teacher, labels, labels)
    each = uld_loss(*arguments, reduction="none")
    assert each[2] == 0
    torch.testing.assert_close(uld_loss(*arguments), each.sum() / 2)
    torch.testing.assert_close(uld_loss(*arguments, reduction="sum"), each.sum())
    torch.testing.assert_close(uld_loss(*arguments, num_items_in_batch=torch.tensor(8)), each.sum() / 8)
    nothing = torch.full((3, 6), -100)
    value, gradient = value_and_gradient(uld_loss, torch.full_like(student, float("nan")), teacher, nothing, nothing)
    assert value == 0
    assert (gradient == 0).all()


def test_a_sequence_with_other_spans_on_its_two_sides_shows():
    student, teacher = logits_of(2, 6, 20), logits_of(2, 6, 20)
    one, two = labels_of(6, (1, 4), (1, 4)), labels_of(6, (1, 4), (1, 1, 3, 1))
    assert uld_loss(student, teacher, one, two, reduction="none").isnan().tolist() == [False, True]
    assert uld_loss(student, teacher, one, two).isnan()


def test_sides_of_any_length():
    student, teacher = logits_of(2, 4, 20), logits_of(2, 9, 20)
    expected = sorted_l1(student, teacher[:, :4]).mean()
    torch.testing.assert_close(uld_loss(student, teacher), expected)
    torch.testing.assert_close(uld_loss(teacher, student), expected)
    assert uld_loss(logits_of(1, 1, 3), logits_of(1, 1, 1)).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precisions_are_computed_in_float32(dtype):
    student, teacher = logits_of(2, 5, 60, dtype), logits_of(2, 5, 70, dtype)
    value, gradient = value_and_gradient(uld_loss, student, teacher)
    wide, wide_gradient = value_and_gradient(uld_loss, student.float(), teacher.float())
    torch.testing.assert_close(value, wide)
    torch.testing.assert_close(gradient, wide_gradient.to(dtype))


def test_vocabulary_sizes_leave_padding_out():
    student, teacher = logits_of(2, 5, 25), logits_of(2, 5, 30)
    padded = torch.cat((student, torch.full((2, 5, 7), 9.0)), 2)
    torch.testing.assert_close(uld_loss(padded, teacher, student_vocab_size=25), uld_loss(student, teacher))


def test_a_module_is_its_function_and_composes():
    student, teacher = logits_of(2, 5, 20), logits_of(2, 6, 22)
    labels = labels_of(5, (1, 3), (2, 2)), labels_of(6, (2, 3), (1, 4))
    options = {"top_k": 5, "tail": "drop", "ties": "stable", "student_temperature": 2.0}
    module = ULDLoss(**options)
    assert "top_k=5" in repr(module)
    expected = value_and_gradient(uld_loss, student, teacher, *labels, **options)
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        for a, b in zip(value_and_gradient(function, student, teacher, *labels), expected, strict=True):
            torch.testing.assert_close(a, b)
    with NoHostSync():
        module(student, teacher, *labels, return_components=True)


S, T = logits_of(2, 4, 9), logits_of(2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((S[0], T), {}, ValueError, r"student_logits must be \[B, T, V\], got \(4, 9\)"),
        ((S, T[:1]), {}, ValueError, "same batch size, got"),
        ((S, T, Rows.every(3, 4)), {}, ValueError, "student_labels.count must be"),
        ((S, T), {"student_temperature": 0}, ValueError, "student_temperature must be above 0"),
        ((S, T), {"teacher_temperature": "1"}, TypeError, "teacher_temperature must be a number"),
        ((S, T), {"ties": "first"}, ValueError, "ties must be one of"),
        ((S, T), {"top_k": 0}, ValueError, "top_k must be at least 1"),
        ((S, T), {"teacher_vocab_size": 10}, ValueError, "teacher_vocab_size must be .* at most 8"),
        ((S, T), {"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ((S, T), {"token_weight": torch.ones(2, 5)}, ValueError, r"token_weight must be \[B, T\] as student_logits"),
        ((S, T), {"temperature": 2}, TypeError, "temperature"),
    ],
)
def test_bad_input_is_named(arguments, options, error, words):
    with pytest.raises(error, match=words):
        uld_loss(*arguments, **options)
