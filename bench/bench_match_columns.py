"""The student columns that meet a teacher's 50, chosen greedily; indices, without a gradient."""

import torch

from bench.baselines import rows
from bench.suite import Peer, Suite, nbytes, sized
from mlot_kernels import Ranked, match_columns
from mlot_kernels.ops.match_columns.cases import large

SIZE = ("sequences", "rows", "vocabulary", "k")


def ours(student, log_t, backend):
    unused = torch.zeros(log_t.shape[::2], dtype=torch.int64, device=log_t.device)  # [B, k]
    teacher = Ranked(log_t[None], unused, log_t[..., 0])
    return (match_columns(student, teacher, backend=backend),)


def greedy(student, log_t):
    """Eager: every distance at once, then one column after the other."""
    s, t = rows.wide(student).softmax(-1).mT, rows.wide(log_t).exp().mT  # [B, V, A], [B, k, A]
    costs = torch.cdist(t, s, p=1)
    columns = []
    for i in range(costs.shape[1]):
        columns.append(costs[:, i].argmin(-1, keepdim=True))
        costs.scatter_(2, columns[-1][:, None].expand(-1, costs.shape[1], -1), float("inf"))
    return (torch.cat(columns, 1),)


SUITE = Suite(
    "match_columns",
    operators=("match_columns",),
    inputs=large,
    leaves=(),
    ours=ours,
    peers={"torch.cdist": Peer(greedy)},
    traffic=lambda student, log_t: (nbytes(student, log_t), 0),
    logits=1,
    sizes={
        "quick": sized(SIZE, (2, 16, 50_304, 50)),
        "full": sized(SIZE, (2, 32, 50_304, 50), (2, 32, 151_936, 50), (2, 128, 50_304, 50)),
    },
    gpu_sizes={
        "quick": sized(SIZE, (8, 256, 50_304, 50)),
        "full": sized(SIZE, (8, 256, 50_304, 50), (8, 256, 151_936, 50)),
    },
)


def test_match_columns(take, measurement):
    take(measurement)
