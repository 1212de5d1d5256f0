"""ULD and Multi-Level-OT of groups of tokens."""

import pytest
import torch

from mlot_kernels import (
    MultiLevelOTLoss,
    TeacherTopK,
    ULDLoss,
    align_byte_offsets,
    merge_groups,
    multi_level_ot_loss,
    transport_cost,
    uld_loss,
)
from mlot_kernels.losses.merged import _SumOfGroups
from mlot_kernels.merging import STRATEGIES
from tests import gold
from tests.dispatch_modes import Allocations, NoHostSync
from tests.losses.examples import value_and_gradient
from tests.test_merging import aligned


def merged(batch: gold.Batch, strategy: str = "observed"):
    return merge_groups(aligned(batch), batch.student_ids, batch.teacher_ids, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("starts", [(1, 4), (0, 1)])
def test_uld_is_the_loop_over_groups(strategy, starts):
    for seed in range(4):
        batch = gold.batch(seed, starts=starts)
        temperatures = (1.5, 0.8)
        options = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
        ours = value_and_gradient(uld_loss, *batch[:2], alignment=merged(batch, strategy), reduction="none", **options)
        expected = value_and_gradient(
            lambda student: gold.uld(batch._replace(student=student), strategy, temperatures=temperatures),  # noqa: B023
            batch.student,
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_factors_below_the_least_count_as_it_and_get_no_gradient():
    batch = gold.batch(3, lengths=(16, 9), fewest=4)
    student = batch.student * 20
    batch = batch._replace(student=student)
    p = student.softmax(-1).gather(2, batch.student_ids[..., None])
    assert (p < 1e-8).any()
    ours = value_and_gradient(uld_loss, *batch[:2], alignment=merged(batch), reduction="none")
    expected = value_and_gradient(lambda own: gold.uld(batch._replace(student=own), "observed"), student)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def paper(s, s2, t, t2, k):
    """The loss of one sequence, from its merged probabilities ``[G, V]`` at temperatures 1 and 2."""
    own, other = (x.sum(0).sort(descending=True, stable=True).indices[:k] for x in (s, t))
    kept = [x[:, columns] for x, columns in ((s, own), (t, other), (s2, own), (t2, other))]
    absolute = (kept[0] - kept[1]).abs().sum()
    logarithmic = -(kept[1] * kept[0].log()).sum()
    transport = transport_cost(
        kept[3][None], kept[2][None], metric="l1", epsilon=0.1, iterations=20, marginals="unit", backend="reference"
    ).cost[0]
    return absolute + 0.1 * logarithmic + 0.1 * transport


@pytest.mark.parametrize("strategy", ["observed", "bayesian"])
def test_multi_level_ot_ranks_merged_rows(strategy):
    batch = gold.batch(5, starts=(0, 3))

    alignment = merged(batch, strategy)
    index = alignment.pairs.student.index, alignment.pairs.teacher.index

    def loss(student):
        each = []
        for b in range(len(student)):
            rows = gold.rows_of_groups(batch._replace(student=student), b, strategy)
            warm = [
                (logits[b, own[b, : len(row)]] / 2).softmax(1) * row.sum(1, keepdim=True)
                for logits, own, row in zip((student, batch.teacher), index, rows, strict=True)
            ]
            each.append(paper(rows[0], warm[0], rows[1], warm[1], 20))
        return torch.stack(each)

    ours = value_and_gradient(multi_level_ot_loss, *batch[:2], alignment=alignment, k=20, reduction="none")
    for a, b in zip(ours, value_and_gradient(loss, batch.student), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("matching", ["sum", "greedy", "optimal"])
def test_without_factors_an_alignment_names_rows(matching):
    batch = gold.batch(2, dtype=torch.float32)
    alignment = merged(batch, "first")
    rows = alignment.pairs.student, alignment.pairs.teacher
    for a, b in zip(
        value_and_gradient(MultiLevelOTLoss(matching=matching), *batch[:2], alignment=alignment),
        value_and_gradient(MultiLevelOTLoss(matching=matching), *batch[:2], *rows),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", [uld_loss, multi_level_ot_loss])
def test_composes(loss):
    batch = gold.batch(4, dtype=torch.float32)
    alignment, options = merged(batch), {"return_components": False}
    weight = torch.rand(batch.student.shape[:2])
    expected = value_and_gradient(loss, *batch[:2], alignment=alignment, token_weight=weight, **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ways = {
        "compile": lambda *a, **o: value_and_gradient(compiled, *a, **o),
        "func": lambda student, *a, **o: tuple(
            reversed(torch.func.grad_and_value(lambda own: loss(own, *a, **o))(student))
        ),
        "checkpoint": lambda student, *a, **o: value_and_gradient(
            lambda own: torch.utils.checkpoint.checkpoint(loss, own, *a, use_reentrant=False, **o), student
        ),
    }
    for name, way in ways.items():
        for a, b in zip(way(*batch[:2], alignment=alignment, token_weight=weight), expected, strict=True):
            torch.testing.assert_close(a, b, msg=name)
    with NoHostSync():
        loss(*batch[:2], alignment=alignment, return_components=True)


@pytest.mark.parametrize("loss", [uld_loss, multi_level_ot_loss])
def test_backward_twice_and_both_sides(loss):
    batch = gold.batch(4, dtype=torch.float32)
    student, teacher = (x.clone().requires_grad_() for x in batch[:2])
    value = loss(student, teacher, alignment=merged(batch))
    first = torch.autograd.grad(value, (student, teacher), retain_graph=True)
    second = torch.autograd.grad(value, (student, teacher), retain_graph=True)
    doubled = torch.autograd.grad(2 * value, (student, teacher))
    for a, b, c in zip(first, second, doubled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(2 * a, c)
        assert (a != 0).any()


@pytest.mark.parametrize("loss", [uld_loss, multi_level_ot_loss])
def test_gradients_of_both_sides_against_differences(loss):
    batch = gold.batch(6, B=2, lengths=(8, 7), vocabularies=(9, 8), shared=4, starts=(1, 2))
    alignment = merged(batch, "bayesian")
    inputs = tuple(x.clone().requires_grad_() for x in batch[:2])
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, alignment=alignment), inputs, fast_mode=True)


def test_rows_that_do_not_count_are_not_read():
    batch = gold.batch(4, dtype=torch.float32)
    alignment = merged(batch)
    expected = value_and_gradient(uld_loss, *batch[:2], alignment=alignment)
    student, teacher = (
        x.masked_fill((labels == -100)[..., None], float("nan"))
        for x, labels in zip(batch[:2], (batch.student_labels, batch.teacher_labels), strict=True)
    )
    for a, b in zip(value_and_gradient(uld_loss, student, teacher, alignment=alignment), expected, strict=True):
        assert torch.equal(a, b)


def test_a_nan_shows_in_its_sequence():
    batch = gold.batch(4, dtype=torch.float32)
    alignment = merged(batch)
    assert alignment.student.rows.count[1] > 0
    batch.student[1, alignment.student.rows.index[1, 0], 3] = float("nan")
    each = uld_loss(*batch[:2], alignment=alignment, reduction="none")
    assert each.isnan().tolist() == [False, True, False]


def test_coverage_is_a_component():
    batch = gold.batch(4)
    parts = uld_loss(*batch[:2], alignment=merged(batch), return_components=True)[1]
    torch.testing.assert_close(parts["coverage"], aligned(batch).coverage.mean())


@pytest.mark.parametrize("loss", [uld_loss, multi_level_ot_loss])
def test_gradients_meet_in_one_tensor(loss):
    batch = gold.batch(4, B=1, lengths=(160, 170), vocabularies=(2000, 1900), dtype=torch.float32, fewest=140)
    alignment = merged(batch)
    assert alignment.student.rows.count.sum() > 20
    student = batch.student.clone().requires_grad_()
    value = loss(student, batch.teacher, alignment=alignment)
    gradient = student.numel() * 4
    with Allocations() as mode:
        value.backward()
    assert gradient <= mode.peak < 1.2 * gradient


def test_sums_of_groups():
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    group = torch.tensor([[0, 0, 0, 2, 3, 3, 3, 3, 3], [1, 1, 4, 5, 5, 5, 5, 5, 5]])
    sums = _SumOfGroups.apply(x, group, 5)
    expected = torch.zeros(2, 6, dtype=torch.float64).scatter_add(1, group, x)[:, :5]
    torch.testing.assert_close(sums, expected)
    assert torch.autograd.gradcheck(lambda x: _SumOfGroups.apply(x, group, 5), (x,))
    with_nan = x.detach().clone()
    with_nan[0, 3] = float("nan")
    assert _SumOfGroups.apply(with_nan, group, 5)[0].isnan().tolist() == [False, False, True, False, False]


BATCH = gold.batch(0, dtype=torch.float32)
ALIGNMENT = merged(BATCH)
LABELS = BATCH.student_labels
TOP = TeacherTopK(BATCH.teacher.log_softmax(-1).topk(4).values)


@pytest.mark.parametrize("loss", [ULDLoss(), MultiLevelOTLoss()], ids=["ULDLoss", "MultiLevelOTLoss"])
@pytest.mark.parametrize(
    ("arguments", "alignment", "error", "words"),
    [
        ((*BATCH[:2], LABELS), ALIGNMENT, ValueError, "student_labels and teacher_labels must be None beside"),
        (BATCH[:2], aligned(BATCH), TypeError, "alignment must be MergedRows of merge_groups, got Alignment"),
        ((BATCH.student, TOP), ALIGNMENT, TypeError, "teacher_logits must be a tensor, got TeacherTopK: merged rows"),
        ((BATCH.student[:, 1:], BATCH.teacher), ALIGNMENT, ValueError, "student's rows of alignment are rows of"),
        ((BATCH.student[:1], BATCH.teacher[:1]), ALIGNMENT, ValueError, "student's rows of alignment must be"),
    ],
)
def test_bad_input_is_named(loss, arguments, alignment, error, words):
    with pytest.raises(error, match=words):
        loss(*arguments, alignment=alignment)


def test_a_shift_beside_an_alignment_is_refused():
    with pytest.raises(ValueError, match="shift says how labels lie, got 0 beside an alignment"):
        uld_loss(*BATCH[:2], alignment=ALIGNMENT, shift=0)


def test_no_group_counts():
    batch = gold.batch(1)
    nothing = torch.zeros_like(batch.student_labels, dtype=torch.bool)
    alignment = merge_groups(
        align_byte_offsets(batch.student_offsets, batch.teacher_offsets, nothing), batch.student_ids, batch.teacher_ids
    )
    for loss in (uld_loss, multi_level_ot_loss):
        value, gradient = value_and_gradient(loss, *batch[:2], alignment=alignment)
        assert value == 0
        assert (gradient == 0).all()
