import itertools

import pytest
import torch

from mlot_kernels import Rows, pair
from tests.dispatch_modes import NoHostSync
from tests.properties import given, st

label_rows = st.integers(1, 9).flatmap(
    lambda T: st.lists(st.lists(st.sampled_from([-100, 0, 7]), min_size=T, max_size=T), min_size=1, max_size=3)
)


def spans_of(labels: list[int], shift: int) -> list[list[int]]:
    """The runs of positions that count, by a plain loop."""
    runs: list[list[int]] = []
    for i in range(len(labels) - shift):
        if labels[i + shift] == -100:
            continue
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def listed(rows: Rows, b: int) -> list[list[int]]:
    n = int(rows.count[b])
    spans: list[list[int]] = [[] for _ in range(int(rows.spans[b]))]
    for position, span in zip(rows.index[b, :n].tolist(), rows.span[b, :n].tolist(), strict=True):
        spans[span].append(position)
    assert (rows.index[b, n:] == -1).all()
    assert (rows.span[b, n:] == -1).all()
    return spans


@given(label_rows, st.integers(0, 1))
def test_labels_make_rows_and_spans(labels, shift):
    rows = Rows.from_labels(torch.tensor(labels), shift=shift)
    one = Rows.from_labels(torch.tensor(labels), shift=shift, spans="one")
    for b, sequence in enumerate(labels):
        expected = spans_of(sequence, shift)
        assert listed(rows, b) == expected
        assert listed(one, b) == [list(itertools.chain(*expected))]


def test_rows_from_lengths_keep_empty_spans():
    rows = Rows.from_lengths(torch.tensor([[1, 3, 6], [0, 2, 2]]), torch.tensor([[2, 0, 9], [1, 0, 3]]), 8)
    assert listed(rows, 0) == [[1, 2], [], [6, 7]]
    assert listed(rows, 1) == [[0], [], [2, 3, 4]]
    single = Rows.from_lengths(torch.tensor([2, 5]), torch.tensor([3, 0]), 6)
    assert listed(single, 0) == [[2, 3, 4]]
    assert listed(single, 1) == [[]]


def test_every_row():
    assert [listed(Rows.every(2, 3), b) for b in range(2)] == [[[0, 1, 2]]] * 2
    assert Rows.every(2, 0).index.shape == (2, 0)


@given(label_rows, label_rows)
def test_pairs_are_those_of_a_plain_loop(student, teacher):
    B = min(len(student), len(teacher))
    sides = [Rows.from_labels(torch.tensor(labels[:B]), shift=0) for labels in (student, teacher)]
    pairs = pair(*sides)
    assert torch.equal(pairs.student.count, pairs.teacher.count)
    assert pairs.student.index.shape == pairs.teacher.index.shape == sides[0].index.shape
    for b in range(B):
        s, t = spans_of(student[b], 0), spans_of(teacher[b], 0)
        assert bool(pairs.mismatched[b]) == (len(s) != len(t) and min(len(s), len(t)) > 0)
        expected = [] if len(s) != len(t) else [p for x, y in zip(s, t, strict=True) for p in zip(x, y, strict=False)]
        n = int(pairs.student.count[b])
        found = list(zip(pairs.student.index[b, :n].tolist(), pairs.teacher.index[b, :n].tolist(), strict=True))
        assert found == expected
        for side, slots, cut in zip(
            sides, (pairs.student_slot, pairs.teacher_slot), (pairs.student, pairs.teacher), strict=True
        ):
            assert torch.equal(side.index[b, slots[b, :n]], cut.index[b, :n])


def test_mismatched_spans_raise_under_check():
    one, two = torch.tensor([[True, True, True]]), torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match=r"sequence 0 has 1 answer spans .* and 2 on the teacher's; mask the labels"):
        pair(Rows.from_mask(one), Rows.from_mask(two), check=True)
    assert pair(Rows.from_mask(one), Rows.from_mask(two)).mismatched.all()
    assert not pair(Rows.from_mask(one), Rows.from_mask(two, spans="one"), check=True).mismatched.any()


def test_a_side_on_which_nothing_counts_is_no_mismatch():
    labels = torch.tensor([[-100, 1, 1, -100, 1]])
    pairs = pair(Rows.from_labels(labels), Rows.from_labels(torch.full((1, 5), -100)), check=True)
    assert not pairs.mismatched.any()
    assert pairs.student.count.item() == 0


def test_no_position_at_all():
    rows = Rows.from_labels(torch.zeros(2, 0, dtype=torch.int64))
    assert rows.index.shape == (2, 0)
    assert pair(rows, Rows.every(2, 3)).student.count.tolist() == [0, 0]


def test_rows_move_to_another_device():
    assert Rows.every(2, 3).to("meta").index.device.type == "meta"


def test_nothing_waits_for_the_device():
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100] * 5])
    with NoHostSync():
        rows = Rows.from_labels(labels)
        pair(rows, Rows.from_lengths(torch.tensor([1, 2]), torch.tensor([2, 2]), 5))
        pair(rows, Rows.from_mask(labels > 0))


LABELS = torch.ones(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Rows.from_labels([1, 2]), TypeError, "labels must be a tensor"),
        (lambda: Rows.from_labels(torch.ones(2, 3)), TypeError, "labels must be one of .*got torch.float32"),
        (
            lambda: Rows.from_labels(LABELS[0]),
            ValueError,
            r"labels must be \[B, T\], got \(3,\)",
        ),
        (
            lambda: Rows.from_labels(LABELS, shift=-1),
            ValueError,
            "shift must be at least 0",
        ),
        (lambda: Rows.from_labels(LABELS, shift=True), TypeError, "shift must be an int"),
        (lambda: Rows.from_labels(LABELS, spans="two"), ValueError, "'runs', 'one'"),
        (lambda: Rows.from_labels(LABELS.to(torch.uint8)), TypeError, "labels must be one of .*got torch.uint8"),
        (lambda: Rows.from_lengths(LABELS[:, :0], LABELS[:, :0], 4), ValueError, "the number of spans"),
        (lambda: Rows.from_mask(torch.ones(1, 3)), TypeError, "mask must be one of torch.bool"),
        (
            lambda: Rows.from_lengths(torch.ones(2, dtype=torch.int64), torch.ones(3, dtype=torch.int64), 4),
            ValueError,
            r"lengths must be of the shape of starts, \(2,\) here, got \(3,\)",
        ),
        (
            lambda: Rows.from_lengths(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), -1),
            ValueError,
            "width must be at least 0",
        ),
        (lambda: pair(Rows.every(2, 3), Rows.every(3, 3)), ValueError, "teacher_rows.count"),
        (
            lambda: pair(Rows.every(2, 3), Rows.every(2, 3, "meta")),
            ValueError,
            "one device, got student_rows on cpu, teacher_rows on meta",
        ),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
