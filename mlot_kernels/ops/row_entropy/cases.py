"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

from mlot_kernels.cases import Case, large_logits, logits_case, logits_examples
from mlot_kernels.logits import Logits
from mlot_kernels.ops.row_entropy import reference, row_entropy


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return [_case(*example) for example in logits_examples(dtype, device)]


def large(
    dtype: torch.dtype, device: str, seed: int = 0, *, sequences: int, rows: int, vocabulary: int
) -> tuple[Tensor, ...]:
    """Inputs of a real size: logits ``[sequences, rows, vocabulary]``."""
    return (large_logits(dtype, device, seed, sequences, rows, vocabulary),)


def large_cases(
    dtype: torch.dtype, device: str, *, sequences: int = 2, rows: int = 256, vocabulary: int = 151_936
) -> list[Case]:
    (values,) = large(dtype, device, sequences=sequences, rows=rows, vocabulary=vocabulary)
    return [_case("large", Logits(values), False)]


def _case(name: str, logits: Logits, smooth: bool) -> Case:
    return logits_case(
        name,
        logits,
        smooth,
        lambda z, backend: (row_entropy(z, backend=backend),),
        lambda *fields: (reference.row_entropy(*fields),),
        output_rows=(2,),
        batch_dimensions=(0,),
    )
