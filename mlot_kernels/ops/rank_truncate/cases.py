"""Inputs that the tests and the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlot_kernels.cases import Case, Outputs, large_logits, logits_case, logits_examples
from mlot_kernels.logits import Logits
from mlot_kernels.ops.rank_truncate import gather_columns, rank_truncate, reference

ALSO_AT = (2.0, 3.0)


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
    return [
        _ranked("50 columns", Logits(values), False, 50, "sequence", also_at=()),
        _ranked("50 columns at two temperatures", Logits(values), False, 50, "sequence", also_at=(2.0,)),
    ]


def _cases(dtype: torch.dtype, device: str) -> Iterator[Case]:
    for name, logits, smooth in logits_examples(dtype, device):
        size = logits.values.shape[-1] if logits.vocab_size is None else logits.vocab_size
        k = min(5, size, size if logits.columns is None else int(logits.columns[:size].sum()))
        for scope in reference.SCOPES:
            if scope == "sequence" or name in ("odd width", "several spans", "every field", "all equal"):
                yield _ranked(f"{name}, scope {scope}", logits, smooth, k, scope)
    wide = Logits(torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).to(dtype).to(device))
    yield _ranked("k = V", wide, True, 40, "sequence")
    yield _ranked("k = 1", wide, True, 1, "sequence")
    columns = torch.tensor([[3, 0, 39, 3], [7, 1, 2, 5]], device=device)
    yield _gathered("given columns, one twice", wide, columns)
    yield _gathered("given columns of each row", wide, columns[:, None].expand(-1, 3, -1).contiguous())


def _ranked(name: str, logits: Logits, smooth: bool, k: int, scope: str, also_at: tuple[float, ...] = ALSO_AT) -> Case:
    def call(z: Logits, backend: str | None) -> Outputs:
        ranked = rank_truncate(z, k=k, scope=scope, also_at=also_at, backend=backend)
        return ranked.log_probabilities, ranked.kept_mass

    def definition(*fields: object) -> Outputs:
        return _defined(fields, None, k, scope, also_at)

    return logits_case(
        name, logits, smooth, call, definition, output_rows=(3, 2), batch_dimensions=(1, 0), splits=scope != "batch"
    )


def _gathered(name: str, logits: Logits, columns: Tensor) -> Case:
    def call(z: Logits, backend: str | None) -> Outputs:
        ranked = gather_columns(z, columns, also_at=ALSO_AT, backend=backend)
        return ranked.log_probabilities, ranked.kept_mass

    def definition(*fields: object) -> Outputs:
        return _defined(fields, columns, columns.shape[-1], "sequence", ALSO_AT)

    return logits_case(name, logits, True, call, definition, output_rows=(3, 2), batch_dimensions=(1, 0), splits=False)


def _defined(fields: tuple, given: Tensor | None, k: int, scope: str, also_at: tuple[float, ...]) -> Outputs:
    values, index, column_mask, log_scale, temperature, standardize, vocab_size = fields
    log_probabilities, _, kept_mass = reference.rank_truncate(
        values, index, column_mask, log_scale, given, (temperature, *also_at), standardize, vocab_size, k, scope
    )
    return log_probabilities, kept_mass
