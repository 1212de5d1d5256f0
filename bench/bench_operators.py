"""Every operator on every backend that runs here, forward and both, on inputs of a real size."""

from __future__ import annotations

import pytest
import torch

from mlot_kernels import (
    pairwise_cost,
    rank_truncate,
    row_entropy,
    sinkhorn,
    sorted_l1,
    token_log_probability,
    topk_softmax,
    transport_cost,
)

V = 50_257
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(2, 48, V, generator=GENERATOR)
TEACHER = 3 * torch.randn(2, 48, 32_000, generator=GENERATOR)
TOKENS = torch.randint(V, (2, 48), generator=GENERATOR)
FEATURES = [torch.rand(4, n, 50, generator=GENERATOR) / 50 for n in (256, 224)]
COST = torch.rand(4, 256, 224, generator=GENERATOR)

CALLS = {
    "row_entropy": ((LOGITS,), lambda x: row_entropy(x)),
    "rank_truncate": ((LOGITS,), lambda x: rank_truncate(x, k=50).log_probabilities),
    "token_log_probability": ((LOGITS,), lambda x: token_log_probability(x, TOKENS)),
    "topk_softmax": ((LOGITS,), lambda x: topk_softmax(x, 50).log_probabilities),
    "sorted_l1": ((LOGITS,), lambda x: sorted_l1(x, TEACHER)),
    "transport_cost": (tuple(FEATURES), lambda x, y: transport_cost(x, y, marginals="unit").cost),
    "pairwise_cost": (tuple(FEATURES), lambda x, y: pairwise_cost(x, y)),
    "sinkhorn": ((COST,), lambda cost: sinkhorn(cost, marginals="unit").cost),
}


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("name", CALLS)
def test_operator(benchmark, name, direction):
    inputs, call = CALLS[name]
    leaves = [x.detach().requires_grad_(direction != "forward") for x in inputs]
    benchmark.group = direction

    def run() -> torch.Tensor:
        output = call(*leaves)
        if direction != "forward":
            for leaf in leaves:
                leaf.grad = None
            output.sum().backward()
        return output

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
