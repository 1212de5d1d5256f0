import math
from functools import partial

import pytest
import torch

from bench.baselines.multi_level_ot import tidied_paper_loss
from mlot_kernels import MultiLevelOTLoss, Rows, multi_level_ot_loss
from mlot_kernels.losses.multi_level_ot import MATCHINGS
from tests.dispatch_modes import NoHostSync
from tests.losses.examples import labels_of, logits_of, value_and_gradient
from tests.properties import given, st


@pytest.mark.parametrize(("V_s", "V_t"), [(80, 65), (65, 80), (30, 65), (80, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_paper_equals_the_paper_written_out(V_s, V_t, dtype):
    student, teacher = logits_of(3, 12, V_s, dtype), logits_of(3, 15, V_t, dtype)
    s_labels, t_labels = labels_of(12, (2, 5), (0, 7), (8, 3)), labels_of(15, (1, 6), (4, 4), (9, 5))
    ours = value_and_gradient(MultiLevelOTLoss.paper(), student, teacher, s_labels, t_labels)
    rows = [Rows.from_labels(labels, spans="one") for labels in (s_labels, t_labels)]
    expected = value_and_gradient(tidied_paper_loss, student, teacher, *rows)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({"k": 7}, {"k": 7}),
        ({"absolute_weight": 0.3}, {"weights": (0.3, 0.1, 0.1)}),
        ({"logarithmic_weight": 0.7}, {"weights": (1.0, 0.7, 0.1)}),
        ({"transport_weight": 2.0}, {"weights": (1.0, 0.1, 2.0)}),
        ({"transport_temperature": 5.0}, {"transport_temperature": 5.0}),
        ({"epsilon": 0.5}, {"epsilon": 0.5}),
        ({"iterations": 3}, {"iterations": 3}),
        ({"marginals": "uniform"}, {"marginals": "uniform"}),
    ],
    ids=str,
)
def test_every_option_changes_what_it_says(options, by_hand):
    student, teacher = logits_of(2, 8, 40, torch.float64), logits_of(2, 9, 45, torch.float64)
    labels = labels_of(8, (2, 5), (0, 7)), labels_of(9, (1, 6), (4, 4))
    rows = [Rows.from_labels(side, spans="one") for side in labels]
    ours = value_and_gradient(MultiLevelOTLoss(**options), student, teacher, *labels)
    for a, b in zip(ours, value_and_gradient(tidied_paper_loss, student, teacher, *rows, **by_hand), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.isclose(ours[0], tidied_paper_loss(student, teacher, *rows))


@pytest.mark.parametrize("scope", ["batch", "token"])
def test_scopes_rank_what_they_say(scope):
    student, teacher = logits_of(2, 4, 20, torch.float64), logits_of(2, 4, 25, torch.float64)
    _, parts = multi_level_ot_loss(student, teacher, k=3, scope=scope, return_components=True)
    kept = []
    for p in (student.softmax(-1), teacher.softmax(-1)):
        if scope == "batch":
            kept.append(p[..., p.sum((0, 1)).argsort(descending=True)[:3]])
        else:
            kept.append(p.sort(descending=True).values[..., :3])
    torch.testing.assert_close(parts["absolute_difference"], (kept[0] - kept[1]).abs().sum() / 2)


def test_components_follow_the_denominator():
    student, teacher = logits_of(2, 4, 20), logits_of(2, 4, 25)
    loss, parts = multi_level_ot_loss(student, teacher, num_items_in_batch=8, return_components=True)
    total = parts["absolute_difference"] + 0.1 * parts["logarithmic"] + 0.1 * parts["transport"]
    torch.testing.assert_close(total, loss)


def test_a_weight_of_0_takes_an_infinite_row_out():
    student, teacher = logits_of(1, 3, 6), logits_of(1, 3, 6)
    student[0, 1, 2:] = float("-inf")  # probability 0 where the teacher has some: an infinite logarithmic term
    assert multi_level_ot_loss(student, teacher, k=6).isinf()
    weight = torch.tensor([[1.0, 0.0, 1.0]])
    assert multi_level_ot_loss(student, teacher, k=6, token_weight=weight).isfinite()


def test_an_answer_cut_off_on_one_side_costs_nothing():
    student, teacher = logits_of(2, 6, 20), logits_of(2, 6, 20)
    s_labels, t_labels = labels_of(6, (1, 4), (0, 0)), labels_of(6, (1, 4), (2, 3))
    value, gradient = value_and_gradient(multi_level_ot_loss, student, teacher, s_labels, t_labels)
    torch.testing.assert_close(value, multi_level_ot_loss(student[:1], teacher[:1], s_labels[:1], t_labels[:1]))
    assert gradient.isfinite().all()


def test_teacher_padding_is_left_out():
    student, teacher = logits_of(2, 5, 25), logits_of(2, 5, 30)
    padded = torch.cat((teacher, torch.full((2, 5, 7), 9.0)), 2)
    expected = multi_level_ot_loss(student, teacher)
    torch.testing.assert_close(multi_level_ot_loss(student, padded, teacher_vocab_size=30), expected)
    torch.testing.assert_close(MultiLevelOTLoss.paper(teacher_vocab_size=30)(student, padded), expected)


def test_paper_by_hand():
    """Two tokens a side, three columns, k = 2: every number from the definition, with nothing shared."""
    teacher = torch.tensor([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]]], dtype=torch.float64).log()
    student = torch.tensor([[[0.1, 0.3, 0.6], [0.2, 0.3, 0.5]]], dtype=torch.float64).log()
    loss, parts = multi_level_ot_loss(student, teacher, k=2, return_components=True)
    t, s = [[0.7, 0.2], [0.6, 0.3]], [[0.6, 0.3], [0.5, 0.3]]  # teacher columns 0, 1; student columns 2, 1
    pairs = [(a, b) for x, y in zip(t, s, strict=True) for a, b in zip(x, y, strict=True)]
    absolute = sum(abs(a - b) for a, b in pairs)
    logarithmic = -sum(a * math.log(b) for a, b in pairs)
    # at temperature 2 the probabilities are square roots, normalised over all three columns
    t2, s2 = (
        [[math.sqrt(row[i]) / sum(map(math.sqrt, row)) for i in (0, 1)] for row in rows]
        for rows in ([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], [[0.6, 0.3, 0.1], [0.5, 0.3, 0.2]])
    )
    cost = [[sum(abs(a - b) for a, b in zip(x, y, strict=True)) for y in s2] for x in t2]
    plan = [[math.exp(-c / 0.1) for c in row] for row in cost]
    for _ in range(20):
        plan = [[p / sum(row) for p in row] for row in plan]
        totals = [plan[0][j] + plan[1][j] for j in range(2)]
        plan = [[row[j] / totals[j] for j in range(2)] for row in plan]
    transport = sum(p * c for x, y in zip(plan, cost, strict=True) for p, c in zip(x, y, strict=True))
    assert parts["absolute_difference"].item() == pytest.approx(absolute)
    assert parts["logarithmic"].item() == pytest.approx(logarithmic)
    assert parts["transport"].item() == pytest.approx(transport)
    assert loss.item() == pytest.approx(absolute + 0.1 * logarithmic + 0.1 * transport)
    assert parts["teacher_mass"].item() == pytest.approx(0.9)
    assert parts["student_mass"].item() == pytest.approx(0.85)
    assert parts["rows"].item() == 2
    assert parts["coverage"].item() == 1
    terms = {"absolute_difference", "logarithmic", "transport"}
    assert parts.keys() == terms | {"student_mass", "teacher_mass", "coverage", "rows"}
    assert not any(part.requires_grad or part.dim() for part in parts.values())


def test_gradcheck_through_the_whole_loss():
    student, teacher = logits_of(2, 4, 9, torch.float64), logits_of(2, 5, 8, torch.float64)
    rows = Rows.from_mask(torch.tensor([[True, False, True, True], [False, True, True, False]]), spans="one")
    weight = torch.rand(2, 4, dtype=torch.float64) + 0.5
    torch.autograd.gradcheck(
        lambda s, t: multi_level_ot_loss(s, t, rows, k=3, token_weight=weight),
        (student.requires_grad_(), teacher.requires_grad_()),
    )


def test_several_spans_pair_within_spans():
    student, teacher = logits_of(1, 9, 30), logits_of(1, 9, 40)
    s_labels, t_labels = labels_of(9, (1, 2, 5, 3)), labels_of(9, (2, 3, 6, 2))
    parts = multi_level_ot_loss(student, teacher, s_labels, t_labels, return_components=True)[1]
    assert parts["rows"].item() == 4  # min(2, 3) + min(3, 2)
    s, t = (
        x.log_softmax(-1)[0, rows][:, x.softmax(-1)[0, counted].sum(0).argsort(descending=True)[:30]]
        for x, rows, counted in ((student, [0, 1, 4, 5], [0, 1, 4, 5, 6]), (teacher, [1, 2, 5, 6], [1, 2, 3, 5, 6]))
    )
    torch.testing.assert_close(parts["absolute_difference"], (s.exp() - t.exp()).abs().sum())


def test_a_sequence_with_other_spans_on_its_two_sides_shows():
    student, teacher = logits_of(2, 6, 20), logits_of(2, 6, 20)
    one, two = labels_of(6, (1, 4), (1, 4)), labels_of(6, (1, 4), (1, 1, 3, 1))
    per_sequence, gradient = value_and_gradient(multi_level_ot_loss, student, teacher, one, two, reduction="none")
    assert per_sequence.isnan().tolist() == [False, True]
    assert [g.isnan().any().item() for g in gradient] == [False, True]
    assert multi_level_ot_loss(student, teacher, one, two).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counted_is_zero_with_a_zero_gradient(reduction):
    student = torch.full((2, 4, 9), float("nan"))
    labels = torch.full((2, 4), -100)
    value, gradient = value_and_gradient(
        multi_level_ot_loss, student, logits_of(2, 4, 9), labels, labels, reduction=reduction
    )
    assert (value == 0).all()
    assert (gradient == 0).all()


def test_an_empty_answer_does_not_count_in_the_mean():
    student, teacher = logits_of(2, 6, 20), logits_of(2, 6, 20)
    labels, with_empty = labels_of(6, (1, 4), (2, 3)), labels_of(6, (1, 4), (2, 0))
    alone = multi_level_ot_loss(student[:1], teacher[:1], labels[:1], labels[:1])
    torch.testing.assert_close(multi_level_ot_loss(student, teacher, with_empty, with_empty), alone)
    # one side empty, in one span by its making: no pair, no loss
    rows = [Rows.from_labels(x, spans="one") for x in (labels, with_empty)]
    torch.testing.assert_close(multi_level_ot_loss(student, teacher, *rows), alone)


def test_one_token_each():
    loss, parts = multi_level_ot_loss(logits_of(1, 1, 7), logits_of(1, 1, 9), return_components=True)
    assert loss.isfinite()
    assert parts["rows"].item() == 1


def test_reductions_and_denominators():
    student, teacher = logits_of(3, 6, 20), logits_of(3, 6, 20)
    labels = labels_of(6, (1, 4), (2, 3), (0, 0))
    arguments = (student, teacher, labels, labels)
    each = multi_level_ot_loss(*arguments, reduction="none")
    assert each.shape == (3,)
    assert each[2] == 0
    torch.testing.assert_close(multi_level_ot_loss(*arguments, reduction="sum"), each.sum())
    torch.testing.assert_close(multi_level_ot_loss(*arguments), each.sum() / 2)
    for number in (5, 5.0, torch.tensor(5)):
        torch.testing.assert_close(multi_level_ot_loss(*arguments, num_items_in_batch=number), each.sum() / 5)


def test_labels_masks_rows_and_shifts_say_the_same():
    student, teacher = logits_of(2, 6, 20), logits_of(2, 6, 20)
    labels = labels_of(6, (2, 3), (1, 4))
    shifted = torch.cat((labels[:, 1:], torch.full((2, 1), -100)), 1)
    expected = multi_level_ot_loss(student, teacher, labels, labels)
    for same, options in (
        (shifted, {"shift": 0}),
        (shifted != -100, {}),
        (Rows.from_labels(labels), {}),
        (labels.int(), {}),
    ):
        value = multi_level_ot_loss(student, teacher, same, same if options else labels, **options)
        torch.testing.assert_close(value, expected)
    everything = multi_level_ot_loss(student, teacher)
    torch.testing.assert_close(multi_level_ot_loss(student, teacher, Rows.every(2, 6), Rows.every(2, 6)), everything)


def test_token_weights_multiply_rows_and_columns():
    student, teacher = logits_of(2, 5, 20), logits_of(2, 6, 20)
    arguments = (student, teacher)
    plain = multi_level_ot_loss(*arguments)
    torch.testing.assert_close(multi_level_ot_loss(*arguments, token_weight=torch.full((2, 5), 3.0)), 3 * plain)
    weight = torch.ones(2, 5)
    weight[:, 2] = 0
    _, parts = multi_level_ot_loss(*arguments, token_weight=weight, return_components=True)
    _, whole = multi_level_ot_loss(*arguments, return_components=True)
    for name in ("absolute_difference", "logarithmic", "transport"):
        assert 0 < parts[name] < whole[name]
    uncounted = weight.clone()
    uncounted[:, 4] = float("nan")
    labels = labels_of(5, (1, 3), (1, 3))
    rows = Rows.from_labels(labels, shift=0)
    assert multi_level_ot_loss(*arguments, rows, Rows.every(2, 6), token_weight=uncounted).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precisions_are_computed_in_float32(dtype):
    student, teacher = logits_of(2, 5, 60, dtype), logits_of(2, 5, 70, torch.float32)
    value, gradient = value_and_gradient(multi_level_ot_loss, student, teacher)
    wide, wide_gradient = value_and_gradient(multi_level_ot_loss, student.float(), teacher)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value, wide)
    torch.testing.assert_close(gradient, wide_gradient.to(dtype))


def test_vocabulary_sizes_leave_padding_out():
    student, teacher = logits_of(2, 5, 25), logits_of(2, 5, 30)
    padded = torch.cat((student, torch.full((2, 5, 7), 9.0)), 2)
    torch.testing.assert_close(
        multi_level_ot_loss(padded, teacher, student_vocab_size=25), multi_level_ot_loss(student, teacher)
    )
    infinite = torch.cat((teacher, torch.full((2, 5, 4), float("-inf"))), 2)
    torch.testing.assert_close(
        multi_level_ot_loss(student, infinite, k=20), multi_level_ot_loss(student, teacher, k=20)
    )


def test_a_teacher_probability_of_zero_meets_no_logarithm():
    student, teacher = logits_of(1, 3, 4), logits_of(1, 3, 4)
    teacher[..., 2:] = float("-inf")
    student[..., 1:] = float("-inf")
    student[..., 1] = -200.0  # underflows as a probability, not as a logarithm
    value, gradient = value_and_gradient(multi_level_ot_loss, student, teacher, k=4)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_a_view_without_its_last_position_is_taken_as_it_is():
    student, teacher = logits_of(2, 6, 20), logits_of(2, 6, 20)
    torch.testing.assert_close(
        multi_level_ot_loss(student[:, :-1], teacher[:, :-1]),
        multi_level_ot_loss(student[:, :-1].contiguous(), teacher[:, :-1].contiguous()),
    )


@given(st.integers(0, 10_000), st.integers(0, 3))
def test_padding_and_splitting_a_batch_change_nothing(seed, padding):
    torch.manual_seed(seed)
    student, teacher = logits_of(3, 5, 12, torch.float64), logits_of(3, 6, 15, torch.float64)
    labels = torch.where(torch.rand(3, 5) < 0.7, 1, -100), torch.where(torch.rand(3, 6) < 0.7, 1, -100)
    rows = [Rows.from_labels(x, spans="one") for x in labels]
    each = multi_level_ot_loss(student, teacher, *rows, k=4, reduction="none")
    behind = torch.full((3, padding, 12), float("nan"), dtype=torch.float64)
    longer = torch.cat((labels[0], torch.full((3, padding), -100)), 1)
    padded = multi_level_ot_loss(
        torch.cat((student, behind), 1), teacher, Rows.from_labels(longer, spans="one"), rows[1], k=4, reduction="none"
    )
    torch.testing.assert_close(padded, each)
    for b in range(3):
        part = [Rows.from_labels(x[b : b + 1], spans="one") for x in labels]
        alone = multi_level_ot_loss(student[b : b + 1], teacher[b : b + 1], *part, k=4)
        torch.testing.assert_close(alone, each[b])


@given(st.integers(0, 10_000))
def test_permuting_either_vocabulary_changes_nothing(seed):
    torch.manual_seed(seed)
    student, teacher = logits_of(2, 4, 12, torch.float64), logits_of(2, 4, 15, torch.float64)
    plain = multi_level_ot_loss(student, teacher, k=6)
    permuted = multi_level_ot_loss(student[..., torch.randperm(12)], teacher[..., torch.randperm(15)], k=6)
    torch.testing.assert_close(permuted, plain)


def test_a_module_is_its_function():
    student, teacher = logits_of(2, 5, 20), logits_of(2, 5, 20)
    options = {"k": 7, "scope": "token", "transport_weight": 0.5, "reduction": "sum", "iterations": 3}
    module = MultiLevelOTLoss(**options)
    assert "k=7" in repr(module)
    torch.testing.assert_close(module(student, teacher), multi_level_ot_loss(student, teacher, **options))
    torch.testing.assert_close(MultiLevelOTLoss.paper()(student, teacher), multi_level_ot_loss(student, teacher))
    assert not list(module.parameters())


@pytest.mark.parametrize("matching", MATCHINGS)
def test_composes_with_compile_func_and_checkpoint(matching):
    student, teacher = logits_of(2, 5, 20), logits_of(2, 6, 22)
    labels = labels_of(5, (1, 3), (2, 2)), labels_of(6, (2, 3), (1, 4))
    loss = partial(multi_level_ot_loss, matching=matching)
    _, gradient = value_and_gradient(loss, student, teacher, *labels)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradient(compiled, student, teacher, *labels)[1], gradient)
    by_func = torch.func.grad(lambda s: loss(s, teacher, *labels))(student)
    torch.testing.assert_close(by_func, gradient)
    leaf = student.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(loss, leaf, teacher, *labels, use_reentrant=False).backward()
    torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("matching", ["sum", "greedy"])
def test_nothing_waits_for_the_device(matching):
    student, teacher = logits_of(2, 5, 20), logits_of(2, 6, 22)
    with NoHostSync():
        multi_level_ot_loss(
            student,
            teacher,
            labels_of(5, (1, 3), (2, 2)),
            labels_of(6, (2, 3), (1, 4)),
            matching=matching,
            return_components=True,
            num_items_in_batch=torch.tensor(3),
            token_weight=torch.ones(2, 5),
        )


def test_backend_names_one_for_every_operator():
    from mlot_kernels import BackendUnavailable

    student, teacher = logits_of(1, 3, 9), logits_of(1, 3, 9)
    with pytest.raises(BackendUnavailable, match="backend 'cuda'"):
        MultiLevelOTLoss(backend="cuda")(student, teacher)
    MultiLevelOTLoss(backend="reference")(student, teacher)
