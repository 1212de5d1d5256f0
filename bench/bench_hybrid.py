"""GOLD's hybrid loss, tokens aligned and merged within the call: half of either vocabulary is shared."""

import random

import torch
from torch import Tensor

from bench.baselines.gold import dense_hybrid_loss, trl_hybrid_loss
from bench.suite import Peer, Suite, nbytes, sized
from mlot_kernels import align_byte_offsets, hybrid_loss, merge_groups
from mlot_kernels.cases import large_pair

SIZES = ("sequences", "rows", "student_vocabulary", "teacher_vocabulary")


def inputs(
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    *,
    sequences: int,
    rows: int,
    student_vocabulary: int,
    teacher_vocabulary: int,
) -> tuple[Tensor, ...]:
    """Both sides' logits ``[sequences, rows, vocabulary]``, tokens, byte offsets of texts of four bytes a token, cut at
    random places, and pairs of columns."""
    vocabularies = (student_vocabulary, teacher_vocabulary)
    logits = large_pair(
        dtype,
        device,
        seed,
        sequences=sequences,
        rows=rows,
        student_vocabulary=student_vocabulary,
        teacher_vocabulary=teacher_vocabulary,
    )
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ids = [torch.randint(V, (sequences, rows), generator=generator).to(device) for V in vocabularies]
    length = 4 * rows
    offsets = []
    for _ in vocabularies:
        ends = [[0, *sorted(draw.sample(range(1, length), rows - 1)), length] for _ in range(sequences)]
        edges = torch.tensor(ends, device=device)
        offsets.append(torch.stack((edges[:, :-1], edges[:, 1:]), 2))
    shared = min(vocabularies) // 2
    own, other = (torch.randperm(V, generator=generator)[:shared] for V in vocabularies)
    return *logits, *ids, *offsets, torch.stack((own, other.sort().values), 1).to(device)


def ours(
    student: Tensor,
    teacher: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    student_offsets: Tensor,
    teacher_offsets: Tensor,
    column_pairs: Tensor,
    *,
    backend: str | None,
) -> tuple[Tensor]:
    alignment = merge_groups(align_byte_offsets(student_offsets, teacher_offsets), student_ids, teacher_ids)
    return (hybrid_loss(student, teacher, column_pairs=column_pairs, alignment=alignment, backend=backend),)


def eager(*tensors):
    return (dense_hybrid_loss(*tensors),)


def trl(*tensors):
    return (trl_hybrid_loss(*tensors),)


SUITE = Suite(
    "hybrid",
    operators=("sorted_l1", "row_divergence", "token_log_probability"),
    inputs=inputs,
    leaves=(0,),
    ours=ours,
    peers={
        "eager": Peer(eager, sorts=True, waits=True),
        "TRL": Peer(trl, sorts=True, waits=True, needs="trl", only_full=True),
    },
    # Both sides' rows are read once, and once more in backward, where the student's gradient is written.
    traffic=lambda student, teacher, *_: (nbytes(student, teacher), 2 * nbytes(student) + nbytes(teacher)),
    logits=2,
    sizes={
        "quick": sized(SIZES, (1, 64, 131_072, 131_072)),
        # 512 tokens, of which TRL's class takes a minute, are gold_table.py's.
        "full": sized(SIZES, (1, 64, 131_072, 131_072), (2, 32, 50_304, 32_000)),
    },
    gpu_sizes={
        "quick": sized(SIZES, (8, 256, 131_072, 131_072)),
        "full": sized(SIZES, (8, 256, 131_072, 131_072), (8, 512, 50_304, 32_000)),
    },
)


def test_hybrid(take, measurement):
    take(measurement)
