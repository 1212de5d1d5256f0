"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

import torch

from mlot_kernels.cases import Case, logits_case, logits_examples
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
