import pytest
import torch

from bench.baselines import multi_level_ot as baseline
from bench.baselines.multi_level_ot import published_loss
from mlot_kernels import MultiLevelOTLoss, Rows, official_multi_level_ot_loss
from mlot_kernels.losses.official_multi_level_ot import REVISIONS
from tests.dispatch_modes import NoHostSync
from tests.losses.examples import labels_of, logits_of


def compared(student, teacher, *labels, **options):
    ours, published = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = official_multi_level_ot_loss(ours, teacher, *labels, **options)
    expected = published_loss(published, teacher, *labels, **options)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, published.grad)


@pytest.mark.parametrize("revision", REVISIONS)
@pytest.mark.parametrize(("V_s", "V_t"), [(80, 65), (65, 80), (30, 65), (80, 20), (30, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_published_code(revision, V_s, V_t, dtype):
    student, teacher = logits_of(3, 12, V_s, dtype), logits_of(3, 15, V_t, dtype)
    labels = labels_of(12, (2, 5), (0, 7), (8, 3)), labels_of(15, (1, 6), (4, 4), (9, 5))
    compared(student, teacher, *labels, revision=revision)


@pytest.mark.parametrize("revision", REVISIONS)
def test_options_equal_the_published_codes(revision):
    student, teacher = logits_of(2, 12, 70), logits_of(2, 12, 90)
    labels = labels_of(12, (2, 5), (3, 7)), labels_of(12, (1, 6), (4, 4))
    options = {"skip_student_eos": True, "student_temperature": 0.7, "teacher_temperature": 3.0}
    compared(student, teacher, *labels, revision=revision, **options)
    compared(student, teacher, *labels, revision=revision, skip_teacher_eos=True)


def test_an_ignored_label_inside_an_answer_shortens_it_as_published():
    student, teacher = logits_of(2, 12, 70), logits_of(2, 12, 90)
    labels = labels_of(12, (2, 2, 6, 3), (3, 7)), labels_of(12, (1, 6), (4, 2, 7, 1))
    compared(student, teacher, *labels)


def test_rows_are_taken_as_they_are():
    student, teacher = logits_of(2, 9, 60), logits_of(2, 9, 60)
    labels = labels_of(9, (2, 4), (3, 5))
    rows = Rows.from_labels(labels)  # one span behind a prompt: the rows that the published code takes
    expected = official_multi_level_ot_loss(student, teacher, labels, labels)
    torch.testing.assert_close(official_multi_level_ot_loss(student, teacher, rows, rows), expected)
    skipped = official_multi_level_ot_loss(student, teacher, rows, labels, skip_student_eos=True)
    torch.testing.assert_close(
        skipped, official_multi_level_ot_loss(student, teacher, labels, labels, skip_student_eos=True)
    )


def test_where_the_published_code_gives_nan_the_rows_are_zero_rows():
    student, teacher = logits_of(2, 8, 60), logits_of(2, 8, 60)
    labels = labels_of(8, (2, 4), (3, 0)), labels_of(8, (2, 4), (3, 3))
    assert published_loss(student, teacher, *labels).isnan()
    value, parts = official_multi_level_ot_loss(student, teacher, *labels, return_components=True)
    alone = official_multi_level_ot_loss(
        student[:1], teacher[:1], labels[0][:1], labels[1][:1], return_components=True
    )[1]
    assert value.isfinite()
    assert parts["rows"].item() == 4
    assert parts["absolute_difference"] != alone["absolute_difference"]  # ranked with its batch mate
    nothing = torch.full((2, 8), -100)
    leaf = student.clone().requires_grad_()
    value = official_multi_level_ot_loss(leaf, teacher, nothing, nothing)
    value.backward()
    assert value == 0
    assert (leaf.grad == 0).all()


def test_where_the_published_code_raises_the_shorter_side_is_extended_by_zero_rows():
    student, teacher = logits_of(1, 5, 60), logits_of(1, 9, 60)
    labels = labels_of(5, (1, 4)), labels_of(9, (1, 8))
    with pytest.raises(RuntimeError):
        published_loss(student, teacher, *labels)
    value = official_multi_level_ot_loss(student, teacher, *labels)
    longer = torch.cat((student, torch.zeros(1, 4, 60)), 1)
    more_labels = torch.cat((labels[0], torch.full((1, 4), -100)), 1)
    torch.testing.assert_close(value, published_loss(longer, teacher, more_labels, labels[1]))


def test_lower_precisions_are_upcast():
    student, teacher = logits_of(2, 8, 60, torch.bfloat16), logits_of(2, 8, 60, torch.float16)
    labels = labels_of(8, (2, 4), (3, 3))
    leaf = student.clone().requires_grad_()
    value = official_multi_level_ot_loss(leaf, teacher, labels, labels)
    value.backward()
    torch.testing.assert_close(value, published_loss(student.float(), teacher.float(), labels, labels))
    assert leaf.grad.dtype == torch.bfloat16


def published_greedy_loss(monkeypatch, *arguments, **options):
    """The published loss at f=2, its function written with the axes that it was meant to loop over."""
    rank, same_width = baseline._rank, baseline._same_width

    def greedy_algorithm(student, teacher):
        teacher = rank(teacher)
        adjusted = torch.zeros_like(teacher)
        for b in range(len(teacher)):
            available = list(range(student.shape[2]))
            for i in range(min(teacher.shape[2], student.shape[2])):
                costs = (teacher[b, :, i, None] - student[b][:, available]).abs().sum(0)
                adjusted[b, :, i] = student[b, :, available.pop(int(costs.argmin()))]
        return same_width(adjusted, teacher)

    with monkeypatch.context() as patched:
        patched.setattr(baseline, "_rank", lambda p: p)
        patched.setattr(baseline, "_same_width", greedy_algorithm)
        return published_loss(*arguments, **options)


@pytest.mark.parametrize(("V_s", "V_t"), [(80, 65), (65, 80), (30, 65), (80, 20), (30, 20), (20, 30)])
@pytest.mark.parametrize("sides", [(12, 15), (15, 12)], ids=str)
def test_greedy_matching_equals_the_published_loop_over_the_right_axes(monkeypatch, V_s, V_t, sides):
    student, teacher = logits_of(3, sides[0], V_s, torch.float64), logits_of(3, sides[1], V_t, torch.float64)
    labels = labels_of(sides[0], (2, 5), (0, 7), (8, 3)), labels_of(sides[1], (1, 6), (4, 4), (7, 5))
    options = {"skip_student_eos": True, "student_temperature": 0.7, "teacher_temperature": 2.0}
    for leave_out in ({}, options):
        ours, published = student.clone().requires_grad_(), student.clone().requires_grad_()
        value = official_multi_level_ot_loss(ours, teacher, *labels, matching="greedy", **leave_out)
        expected = published_greedy_loss(monkeypatch, published, teacher, *labels, **leave_out)
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, published.grad)


def test_greedy_matching_of_an_empty_answer_and_of_a_nan():
    student, teacher = logits_of(2, 8, 60), logits_of(2, 8, 60)
    labels = labels_of(8, (2, 4), (3, 0)), labels_of(8, (2, 4), (3, 3))
    leaf = student.clone().requires_grad_()
    value = official_multi_level_ot_loss(leaf, teacher, *labels, matching="greedy")
    value.backward()
    assert value.isfinite()
    assert (leaf.grad[1] == 0).all()
    for side in (0, 1):
        sides = [leaf.detach().clone(), teacher.clone()]
        sides[side][0, 2, 7] = float("nan")
        sides[0].requires_grad_()
        value = official_multi_level_ot_loss(*sides, *labels, matching="greedy")
        value.backward()
        assert value.isnan()
        assert sides[0].grad.isnan().any()


def test_reductions_and_components():
    student, teacher = logits_of(3, 8, 60), logits_of(3, 8, 70)
    labels = labels_of(8, (2, 4), (3, 3), (1, 5))
    arguments = (student, teacher, labels, labels)
    mean, parts = official_multi_level_ot_loss(*arguments, return_components=True)
    each = official_multi_level_ot_loss(*arguments, reduction="none")
    torch.testing.assert_close(each.mean(), mean)
    torch.testing.assert_close(official_multi_level_ot_loss(*arguments, reduction="sum"), each.sum())
    torch.testing.assert_close(official_multi_level_ot_loss(*arguments, num_items_in_batch=6), mean / 2)
    total = parts["absolute_difference"] + 0.1 * parts["logarithmic"] + 0.1 * parts["transport"]
    torch.testing.assert_close(total, mean)


def test_a_module_is_its_function():
    student, teacher = logits_of(2, 8, 60), logits_of(2, 8, 70)
    labels = labels_of(8, (2, 4), (3, 3))
    module = MultiLevelOTLoss.official("d8d298f", skip_student_eos=True, teacher_temperature=2)
    expected = official_multi_level_ot_loss(
        student, teacher, labels, labels, revision="d8d298f", skip_student_eos=True, teacher_temperature=2
    )
    torch.testing.assert_close(module(student, teacher, labels, labels), expected)
    assert "revision='d8d298f'" in repr(module)
    greedy = MultiLevelOTLoss.official(matching="greedy")
    expected = official_multi_level_ot_loss(student, teacher, labels, labels, matching="greedy")
    torch.testing.assert_close(greedy(student, teacher, labels, labels), expected)


def test_compiles_and_does_not_wait_for_the_device():
    student, teacher = logits_of(2, 8, 60), logits_of(2, 9, 70)
    labels = labels_of(8, (2, 4), (3, 3)), labels_of(9, (2, 4), (3, 3))
    expected = official_multi_level_ot_loss(student, teacher, *labels)
    compiled = torch.compile(official_multi_level_ot_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher, *labels), expected)
    with NoHostSync():
        official_multi_level_ot_loss(student, teacher, *labels, return_components=True)


S, L = logits_of(2, 4, 9), labels_of(4, (1, 2), (1, 3))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"revision": "main"}, ValueError, "revision must be one of '712cfb4', 'd8d298f', '77e32ae', got 'main'"),
        ({"matching": "optimal"}, ValueError, "matching must be one of 'sum', 'greedy', got 'optimal'"),
        (
            {"matching": "greedy", "revision": "d8d298f"},
            ValueError,
            "matching='greedy' needs revision='712cfb4', got revision='d8d298f'",
        ),
        ({"skip_student_eos": 1}, TypeError, "skip_student_eos must be True or False"),
        ({"student_temperature": 0}, ValueError, "temperature must be above 0"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ({"k": 20}, TypeError, "k"),
    ],
    ids=str,
)
def test_bad_input_is_named(options, error, words):
    with pytest.raises(error, match=words):
        official_multi_level_ot_loss(S, S, L, L, **options)


@pytest.mark.parametrize(
    "options",
    [{"revision": "x"}, {"teacher_temperature": 0}, {"reduction": "x"}, {"backend": "x"}, {"skip_student_eos": 5}],
    ids=str,
)
def test_a_module_names_bad_options_at_once(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        MultiLevelOTLoss.official(**options)


def test_weights_are_refused():
    with pytest.raises(
        ValueError, match=r"token_weight: the published loss has no weights; use MultiLevelOTLoss.paper"
    ):
        MultiLevelOTLoss.official()(S, S, L, L, token_weight=torch.ones(2, 4))
