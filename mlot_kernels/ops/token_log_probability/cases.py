"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlot_kernels.cases import Case, Outputs, large_logits, logits_case, logits_examples, sequence_of
from mlot_kernels.logits import Logits
from mlot_kernels.ops.token_log_probability import reference, token_log_probability


def cases(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Case]:
    return list(_cases(dtype, device))


def large(
    dtype: torch.dtype, device: str, seed: int = 0, *, sequences: int, rows: int, vocabulary: int
) -> tuple[Tensor, ...]:
    """Inputs of a real size: logits ``[sequences, rows, vocabulary]``, and a token for each row."""
    tokens = torch.randint(vocabulary, (sequences, rows), generator=torch.Generator().manual_seed(seed))
    return large_logits(dtype, device, seed, sequences, rows, vocabulary), tokens.to(device)


def large_cases(
    dtype: torch.dtype, device: str, *, sequences: int = 2, rows: int = 256, vocabulary: int = 151_936
) -> list[Case]:
    values, tokens = large(dtype, device, sequences=sequences, rows=rows, vocabulary=vocabulary)
    return [_at("large", Logits(values), False, tokens)]


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(2)
    for name, logits, smooth in logits_examples(dtype, device):
        size = logits.values.shape[-1] if logits.vocab_size is None else logits.vocab_size
        shape = logits.values.shape[:-1] if logits.rows is None else logits.rows.index.shape
        tokens = torch.randint(size, shape, generator=generator).to(device)
        if logits.rows is not None:
            tokens = tokens.masked_fill(~logits.rows.counted, -100)
        yield _at(name, logits, smooth, tokens)
    wide = Logits(torch.randn(2, 3, 40, generator=generator).to(dtype).to(device), standardize=True, vocab_size=38)
    first_and_last = torch.tensor([[0, 37, 0], [37, 37, 1]], device=device)
    yield _at("first and last token", wide, True, first_and_last)
    yield _at("tokens that do not exist", wide, True, torch.tensor([[38, -1, 0], [37, 40, 39]], device=device))


def _at(name: str, logits: Logits, smooth: bool, tokens: Tensor) -> Case:
    def call(z: Logits, backend: str | None) -> Outputs:
        return (token_log_probability(z, tokens, backend=backend),)

    def definition(values: Tensor, index: Tensor, *fields: Any) -> Outputs:
        mask, log_scale, *options = fields
        return (reference.token_log_probability(values, index, mask, log_scale, tokens.view_as(index), *options),)

    case = logits_case(name, logits, smooth, call, definition, output_rows=(2,), batch_dimensions=(0,))
    if case.sequence is None:
        return case
    return replace(
        case, sequence=lambda b: _at(f"{name}, sequence {b}", sequence_of(logits, b), smooth, tokens[b : b + 1])
    )
