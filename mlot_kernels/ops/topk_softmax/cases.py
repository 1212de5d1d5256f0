"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlot_kernels.cases import Case, Outputs, large_logits, logits_case, logits_examples
from mlot_kernels.logits import Logits
from mlot_kernels.ops.topk_softmax import reference, topk_softmax


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def large(
    dtype: torch.dtype, device: str, seed: int = 0, *, sequences: int, rows: int, vocabulary: int
) -> tuple[Tensor, ...]:
    """Inputs of a real size: logits ``[sequences, rows, vocabulary]``."""
    return (large_logits(dtype, device, seed, sequences, rows, vocabulary),)


def large_cases(
    dtype: torch.dtype, device: str, *, sequences: int = 2, rows: int = 256, vocabulary: int = 151_936
) -> list[Case]:
    (values,) = large(dtype, device, sequences=sequences, rows=rows, vocabulary=vocabulary)
    return [_top("50 columns", Logits(values), False, 50)]


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    for name, logits, smooth in logits_examples(dtype, device):
        yield _top(name, logits, smooth, min(5, logits.vocab_size or logits.values.shape[-1]))
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, 3, 40, generator=generator).to(dtype).to(device)
    yield _top("k = V", Logits(values), True, 40)
    yield _top("k = 1, standardized", Logits(values, standardize=True), True, 1)
    yield _top("standardized and far from 0", Logits(values * 2 + 10, standardize=True), True, 7)
    few = torch.arange(40, device=device) % 16 == 3
    yield _top("fewer columns than k", Logits(values, columns=few, standardize=True), True, 6)
    absent = values.masked_fill(torch.arange(40, device=device) % 8 > 0, float("-inf"))
    yield _top("k reaches -inf columns, standardized", Logits(absent, standardize=True, columns=~few), False, 12)


def _top(name: str, logits: Logits, smooth: bool, k: int) -> Case:
    def call(z: Logits, backend: str | None) -> Outputs:
        top = topk_softmax(z, k, backend=backend)
        return top.log_probabilities, top.lse

    def definition(*fields: Any) -> Outputs:
        arguments = [*fields, k]
        log_probabilities, _, lse = reference.topk_softmax(*arguments)
        return log_probabilities, lse

    return logits_case(name, logits, smooth, call, definition, output_rows=(2, 2), batch_dimensions=(0, 0))
