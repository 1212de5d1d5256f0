"""The whole Multi-Level-OT loss, forward and backward, beside the paper's loss by hand and the published one."""

from __future__ import annotations

import pytest
import torch

from bench.baselines.multi_level_ot import published_loss, tidied_paper_loss
from mlot_kernels import Rows, multi_level_ot_loss, official_multi_level_ot_loss

B, T, V_S, V_T = 2, 48, 50_257, 32_000  # GPT-2's vocabulary and Llama 2's


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (3 * torch.randn(B, T, V, generator=generator)).to(dtype).requires_grad_(V == V_S) for V in (V_S, V_T)
    )
    labels = torch.ones(B, T, dtype=torch.int64)
    labels[:, :8] = -100
    return student, teacher, labels


LOSSES = {
    "paper, ours": multi_level_ot_loss,
    # eager torch has no 16-bit cdist on every device: by hand one takes the logits to float32 first
    "paper, by hand": lambda s, t, a, b: tidied_paper_loss(
        s.float(), t.float(), Rows.from_labels(a), Rows.from_labels(b)
    ),
    "official, ours": official_multi_level_ot_loss,
    "official, published": lambda s, t, a, b: published_loss(s.float(), t.float(), a, b),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_multi_level_ot(benchmark, name, dtype):
    student, teacher, labels = _inputs(dtype)
    benchmark.group = f"Multi-Level-OT, forward and backward, {dtype}"

    def run() -> torch.Tensor:
        student.grad = None  # the gradient is fresh memory each time, as in training
        LOSSES[name](student, teacher, labels, labels).backward()
        return student.grad

    gradient = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    assert gradient.isfinite().all()
