import pytest
import torch

from mlot_kernels import multi_level_ot_loss
from mlot_kernels.losses.multi_level_ot import MATCHINGS
from tests.losses.examples import labels_of, logits_of, value_and_gradient
from tests.properties import given, st


def matched_by_a_loop(student, teacher, k, paired_student, paired_teacher):
    """Columns of one sequence, ``[T, V]``: the teacher's by their sums over all rows, the student's by the pairs."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    teacher_columns = t.sum(0).argsort(descending=True)[:k].tolist()
    free, student_columns = list(range(s.shape[1])), []
    for i in teacher_columns:
        costs = [(t[paired_teacher, i] - s[paired_student, j]).abs().sum().item() for j in free]
        student_columns.append(free.pop(costs.index(min(costs))))
    return student_columns, teacher_columns


def test_greedy_matching_equals_a_plain_loop_over_the_paired_rows():
    student, teacher = logits_of(2, 6, 14, torch.float64), logits_of(2, 8, 17, torch.float64)
    loss, parts = multi_level_ot_loss(student, teacher, k=5, matching="greedy", return_components=True)
    absolute = logarithmic = transport = student_mass = 0.0
    for b in range(2):
        columns = matched_by_a_loop(student[b], teacher[b], 5, range(6), range(6))
        (s, s2), (t, t2) = (
            [(x[b] / temperature).softmax(-1)[:, c] for temperature in (1, 2)]
            for x, c in zip((student, teacher), columns, strict=True)
        )
        absolute += (t[:6] - s).abs().sum() / 2
        logarithmic -= (t[:6] * s.log()).sum() / 2
        cost = torch.cdist(t2, s2, p=1)
        plan = (-cost / 0.1).exp()
        for _ in range(20):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        transport += (plan * cost).sum() / 2
        student_mass += s.sum(1).mean() / 2
    torch.testing.assert_close(parts["absolute_difference"], absolute)
    torch.testing.assert_close(parts["logarithmic"], logarithmic)
    torch.testing.assert_close(parts["transport"], transport)
    torch.testing.assert_close(parts["student_mass"], student_mass)
    torch.testing.assert_close(loss, absolute + 0.1 * logarithmic + 0.1 * transport)


def test_matching_sees_only_the_pairs_of_several_spans():
    student, teacher = logits_of(1, 9, 14, torch.float64), logits_of(1, 9, 17, torch.float64)
    s_labels, t_labels = labels_of(9, (1, 2, 5, 3)), labels_of(9, (2, 3, 6, 2))
    parts = multi_level_ot_loss(student, teacher, s_labels, t_labels, k=5, matching="greedy", return_components=True)[1]
    s_rows, t_rows = [0, 1, 4, 5, 6], [1, 2, 3, 5, 6]
    s_columns, t_columns = matched_by_a_loop(student[0, s_rows], teacher[0, t_rows], 5, [0, 1, 2, 3], [0, 1, 3, 4])
    s = student[0].softmax(-1)[[0, 1, 4, 5]][:, s_columns]
    t = teacher[0].softmax(-1)[[1, 2, 5, 6]][:, t_columns]
    torch.testing.assert_close(parts["absolute_difference"], (s - t).abs().sum())


@given(st.integers(0, 10_000))
def test_optimal_matching_never_costs_more_than_the_others(seed):
    torch.manual_seed(seed)
    student, teacher = logits_of(2, 4, 12, torch.float64), logits_of(2, 5, 15, torch.float64)
    only = {"k": 6, "logarithmic_weight": 0, "transport_weight": 0, "reduction": "none"}
    cost = {m: multi_level_ot_loss(student, teacher, matching=m, **only) for m in MATCHINGS}
    assert (cost["optimal"] <= cost["greedy"] + 1e-12).all()
    assert (cost["optimal"] <= cost["sum"] + 1e-12).all()


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
def test_the_same_model_matches_itself_in_any_order_of_its_vocabulary(matching):
    teacher = logits_of(2, 5, 30)
    labels = labels_of(5, (1, 4), (2, 2))
    expected, whole = multi_level_ot_loss(teacher, teacher, labels, labels, k=8, return_components=True)
    for order in (torch.arange(30), torch.randperm(30)):
        loss, parts = multi_level_ot_loss(
            teacher[..., order], teacher, labels, labels, k=8, matching=matching, return_components=True
        )
        assert parts["absolute_difference"] <= 1e-6
        torch.testing.assert_close(parts["logarithmic"], whole["logarithmic"])
        torch.testing.assert_close(loss, expected)


@given(st.integers(0, 10_000))
def test_permuting_either_vocabulary_changes_nothing_for_greedy_matching(seed):
    torch.manual_seed(seed)
    student, teacher = logits_of(2, 4, 12, torch.float64), logits_of(2, 4, 15, torch.float64)
    plain = multi_level_ot_loss(student, teacher, k=6, matching="greedy")
    permuted = student[..., torch.randperm(12)], teacher[..., torch.randperm(15)]
    torch.testing.assert_close(multi_level_ot_loss(*permuted, k=6, matching="greedy"), plain)


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
def test_gradcheck_through_matching(matching):
    student, teacher = logits_of(2, 4, 9, torch.float64), logits_of(2, 5, 8, torch.float64)
    torch.autograd.gradcheck(
        lambda s, t: multi_level_ot_loss(s, t, k=3, matching=matching),
        (student.requires_grad_(), teacher.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("matching", MATCHINGS)
def test_a_nan_shows_in_value_and_gradient_of_its_sequence(matching, side):
    student, teacher = logits_of(2, 4, 9), logits_of(2, 5, 8)
    (student if side == "student" else teacher)[1, 2, 3] = float("nan")
    value, gradient = value_and_gradient(
        multi_level_ot_loss, student, teacher, k=3, matching=matching, reduction="none"
    )
    assert value.isnan().tolist() == [False, True]
    assert [g.isnan().any().item() for g in gradient] == [False, True]


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
def test_matching_without_a_pair_is_zero_with_a_zero_gradient(matching):
    student, teacher = torch.full((2, 4, 9), float("nan")), logits_of(2, 4, 9)
    labels = torch.full((2, 4), -100)
    for arguments in ((student, teacher, labels, labels), (student[:, :0], teacher), (student[:0], teacher[:0])):
        value, gradient = value_and_gradient(multi_level_ot_loss, *arguments, matching=matching)
        assert value == 0
        assert (gradient == 0).all()
