import pytest
import torch

from mlot_kernels import Alignment, align_byte_offsets, merge_groups
from mlot_kernels.merging import STRATEGIES
from tests import gold
from tests.dispatch_modes import NoHostSync


def aligned(batch: gold.Batch, **options) -> Alignment:
    masks = batch.student_labels != -100, batch.teacher_labels != -100
    return align_byte_offsets(batch.student_offsets, batch.teacher_offsets, *masks, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("starts", [(1, 4), (0, 1)])
def test_rows_and_factors_are_those_of_a_walk(strategy, starts):
    for seed in range(6):
        batch = gold.batch(seed, B=4, starts=starts, vocabularies=(5, 6), shared=2)
        merged = merge_groups(aligned(batch), batch.student_ids, batch.teacher_ids, strategy=strategy)
        shift = strategy != "observed"
        for b in range(4):
            answers = [
                (labels[b] != -100).nonzero().flatten().tolist()
                for labels in (batch.student_labels, batch.teacher_labels)
            ]
            ends = [
                offsets[b, answer, 1].tolist()
                for offsets, answer in zip((batch.student_offsets, batch.teacher_offsets), answers, strict=True)
            ]
            groups = gold.walk(*ends, "merge")
            dropped = int(shift and 0 in (answers[0][0], answers[1][0]))
            sides = (merged.pairs.student, merged.student), (merged.pairs.teacher, merged.teacher)
            for answer, ids, own, (rows, factors) in zip(
                answers, (batch.student_ids, batch.teacher_ids), groups, sides, strict=True
            ):
                kept = own[dropped:]
                which = -1 if strategy == "bayesian" else 0
                assert rows.count[b] == len(kept)
                assert rows.index[b, : len(kept)].tolist() == [answer[group[which]] - shift for group in kept]
                assert (rows.index[b, len(kept) :] == -1).all()
                if strategy == "first":
                    assert factors is None
                    continue
                others = [
                    (answer[token], number)
                    for number, group in enumerate(kept)
                    for token in (group[:-1] if which else group[1:])
                ]
                assert factors.rows.count[b] == len(others)
                assert factors.rows.index[b, : len(others)].tolist() == [position - shift for position, _ in others]
                assert factors.tokens[b, : len(others)].tolist() == [ids[b, position].item() for position, _ in others]
                assert factors.group[b, : len(others)].tolist() == [number for _, number in others]
                assert (factors.group[b, len(others) :] == rows.index.shape[1]).all()


def test_nothing_waits_for_the_device():
    batch = gold.batch(1)
    with NoHostSync():
        merge_groups(aligned(batch), batch.student_ids, batch.teacher_ids, strategy="bayesian")


@pytest.mark.parametrize(("T_s", "T_t"), [(0, 3), (3, 0), (0, 0)])
def test_sides_without_positions(T_s, T_t):
    alignment = align_byte_offsets(torch.zeros(2, T_s, 2).long(), torch.zeros(2, T_t, 2).long())
    merged = merge_groups(alignment, torch.zeros(2, T_s).long(), torch.zeros(2, T_t).long())
    assert merged.pairs.student.count.tolist() == [0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_they_move_to_another_device(strategy):
    batch = gold.batch(1)
    groups = aligned(batch)
    merged = merge_groups(groups, batch.student_ids, batch.teacher_ids, strategy=strategy)
    moved = merged.to("meta")
    tensors = [moved.coverage, moved.pairs.student.index, moved.pairs.mismatched, groups.to("meta").student_first]
    tensors += [] if strategy == "first" else [moved.student.tokens, moved.teacher.rows.index]
    assert all(x.is_meta for x in tensors)
    assert (moved.student is None) == (strategy == "first")
    assert torch.equal(merged.to("cpu").pairs.teacher.index, merged.pairs.teacher.index)


BATCH = gold.batch(0)
ALIGNMENT = aligned(BATCH)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((BATCH,), {}, TypeError, "alignment must be an Alignment of align_byte_offsets, got Batch"),
        ((ALIGNMENT,), {}, TypeError, "student_ids must be a tensor .*, got None: strategy 'observed' multiplies"),
        ((ALIGNMENT, BATCH.student_ids), {}, TypeError, "teacher_ids must be a tensor"),
        ((ALIGNMENT,), {"strategy": "mean"}, ValueError, "strategy must be one of 'observed', 'bayesian', 'first'"),
        ((ALIGNMENT, BATCH.student_ids[:, :3], BATCH.teacher_ids), {}, ValueError, "student_ids must be"),
        ((ALIGNMENT, BATCH.student_ids, BATCH.teacher_ids.float()), {}, TypeError, "teacher_ids must be one of"),
    ],
)
def test_bad_input_is_named(arguments, options, error, words):
    with pytest.raises(error, match=words):
        merge_groups(*arguments, **options)
