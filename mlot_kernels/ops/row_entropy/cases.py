"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

from mlot_kernels.cases import Case, large_logits, logits_case, logits_examples
from mlot_kernels.ops.row_entropy import reference, row_entropy


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return [
        logits_case(
            name,
            logits,
            smooth,
            lambda z, backend: (row_entropy(z, backend=backend),),
            lambda *fields: (reference.row_entropy(*fields),),
            output_rows=(2,),
            batch_dimensions=(0,),
        )
        for name, logits, smooth in logits_examples(dtype, device)
    ]


def large(
    dtype: torch.dtype, device: str, seed: int = 0, *, sequences: int, rows: int, vocabulary: int
) -> tuple[Tensor, ...]:
    """Inputs of a real size: logits ``[sequences, rows, vocabulary]``."""
    return (large_logits(dtype, device, seed, sequences, rows, vocabulary),)
