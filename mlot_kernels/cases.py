"""What a case is: one call of an operator, as the contract tests and the benchmarks make it.

Each operator's ``cases.py`` has ``cases(dtype, device) -> list[Case]``, edge cases first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlot_kernels.logits import Logits, log_probabilities
from mlot_kernels.rows import Rows

VOCABULARIES = (32_000, 50_257, 128_256, 151_936)  # Llama 2, GPT-2, Llama 3, Qwen
MOST_COLUMNS = 64  # what an example keeps of a row, and a few scalars

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        name: says in a few words what is special.
        inputs: the differentiable inputs.
        call: ``(inputs, backend) -> `` the differentiable outputs, through the public function.
        definition: ``(inputs) -> `` the same, by autograd of the definition in ``reference.py``.
        input_rows, output_rows: how many leading dimensions of each input and output number its rows; errors are judged
            row by row.
        batch_dimensions: where the batch is in each output.
        sequence: ``(b) -> `` the case with that one sequence; None where the call mixes sequences.
        uncounted: ``(inputs) -> `` inputs with NaN and inf wherever nothing counts; None where all counts.
        counted: index of an element of ``inputs[0]`` in sequence 0 that counts; None where none does.
        gradient_scale: ``(inputs) -> `` for each input what its gradient's rows can reach for upstream gradients of 1
            (broadcasts against its rows): terms of that size cancel in them.
        condition: how much the problem magnifies rounding; four last places times this are no implementation's fault.
        memory: how many floats a call may allocate beside its outputs and gradients; None: not bounded here.
        smooth: gradcheck applies (no tie, no kink, no infinity).
    """

    name: str
    inputs: tuple[Tensor, ...]
    call: Callable[[tuple[Tensor, ...], str | None], Outputs]
    definition: Callable[[tuple[Tensor, ...]], Outputs]
    input_rows: tuple[int, ...]
    output_rows: tuple[int, ...]
    batch_dimensions: tuple[int, ...]
    sequence: Callable[[int], Case] | None = None
    uncounted: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    counted: tuple[int, ...] | None = None
    gradient_scale: Callable[[tuple[Tensor, ...]], tuple[Tensor | float, ...]] = lambda inputs: (1.0,) * len(inputs)
    condition: float = 0.0
    memory: int | None = None
    smooth: bool = True


def logits_examples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Logits, bool]]:
    """Small logits, each with the one thing that has gone wrong in kernels like these, and whether they are smooth."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul(2).to(dtype).to(device)

    def rows(*patterns: str) -> Rows:
        return Rows.from_mask(torch.tensor([[c == "x" for c in pattern] for pattern in patterns], device=device))

    yield "odd width", Logits(randn(2, 3, 37)), True
    yield "one sequence", Logits(randn(4, 21)), True
    yield "one row", Logits(randn(1, 1, 12)), True
    yield "temperature", Logits(randn(2, 3, 19), temperature=2.5), True
    yield "standardized", Logits(randn(2, 3, 23), standardize=True, temperature=1.5), True
    yield "some rows count", Logits(randn(3, 6, 17), rows("x.xx..", "......", "xxxxxx")), True
    yield "several spans", Logits(randn(2, 8, 17), rows("xx.xx..x", ".x.x.x.x"), standardize=True), True
    yield "no row counts", Logits(randn(2, 3, 11), rows("...", "...")), True
    yield "fewer rows than positions", Logits(randn(1, 4, 11), _narrowed(rows(".xx."), 2)), True
    yield "padded vocabulary", Logits(randn(2, 3, 24), vocab_size=19, standardize=True), True
    columns = torch.arange(22, device=device) % 3 > 0
    yield "chosen columns", Logits(randn(2, 3, 22), columns=columns), True
    yield "chosen columns, standardized", Logits(randn(2, 3, 22), columns=columns, standardize=True), True
    yield "log scale", Logits(randn(2, 3, 15), log_scale=-randn(2, 3).abs() / 4), True
    everything = Logits(
        randn(2, 5, 26),
        rows("x..xx", ".xxx."),
        0.7,
        True,
        22,
        torch.arange(26, device=device) % 4 > 0,
        -randn(2, 5) / 8,
    )
    yield "every field", everything, True
    yield "view of a wider tensor", Logits(randn(2, 5, 18)[:, :-1]), True
    yield "permuted", Logits(randn(4, 2, 18).transpose(0, 1)), True
    yield "many rows", Logits(randn(2, 100, 2048)), False
    yield "two tiles and a rest", Logits(randn(1, 2, 2 * 4096 + 5)), False
    yield "large and flat", Logits((1e4 + randn(1, 2, 100).float() * 1e-3).to(dtype)), False
    yield "one-hot", Logits((torch.eye(8)[None] * 60).to(dtype).to(device)), False
    yield "all equal", Logits(torch.zeros(1, 2, 16, dtype=dtype, device=device)), False
    yield "all equal, standardized", Logits(torch.ones(1, 2, 16, dtype=dtype, device=device), standardize=True), False
    behind = torch.arange(20, device=device) >= 15
    yield "-inf columns", Logits(randn(2, 3, 20).masked_fill(behind, float("-inf"))), False
    masked = randn(2, 3, 20).masked_fill(~behind, float("-inf"))
    yield "-inf columns, standardized", Logits(masked, standardize=True), False


def _narrowed(rows: Rows, width: int) -> Rows:
    return Rows(rows.index[:, :width], rows.count, rows.span[:, :width], rows.spans)


def sequence_of(logits: Logits, b: int) -> Logits:
    """Sequence ``b`` of ``[B, T, V]`` logits alone, as a batch of one."""
    rows = logits.rows
    if rows is not None:
        rows = Rows(*(x[b : b + 1] for x in (rows.index, rows.count, rows.span, rows.spans)))
    log_scale = None if logits.log_scale is None else logits.log_scale[b : b + 1]
    return replace(logits, values=logits.values[b : b + 1], rows=rows, log_scale=log_scale)


def logits_case(
    name: str,
    logits: Logits,
    smooth: bool,
    call: Callable[[Logits, str | None], Outputs],
    definition: Callable[..., Outputs],
    output_rows: tuple[int, ...],
    batch_dimensions: tuple[int, ...],
    splits: bool = True,
) -> Case:
    """A case of an operator with one ``Logits``.

    Args:
        call: the public function.
        definition: takes the fields as ``logits.log_probabilities`` does.
        output_rows, batch_dimensions: for ``[B, ...]`` outputs, also where the logits are ``[N, V]``.
        splits: a sequence's result is its own.
    """
    flat = logits.values.dim() == 2
    rows = logits.rows
    if rows is None:
        B, T = (1, logits.values.shape[0]) if flat else logits.values.shape[:2]
        rows = Rows.every(B, T, logits.values.device)
    index = rows.index
    inputs = (logits.values,) if logits.log_scale is None else (logits.values, logits.log_scale)

    def with_inputs(inputs: tuple[Tensor, ...]) -> Logits:
        return replace(logits, values=inputs[0], log_scale=inputs[1] if len(inputs) > 1 else None)

    def run(inputs: tuple[Tensor, ...], backend: str | None) -> Outputs:
        outputs = call(with_inputs(inputs), backend)
        return tuple(y.unsqueeze(d) for y, d in zip(outputs, batch_dimensions, strict=True)) if flat else outputs

    def define(inputs: tuple[Tensor, ...], function: Callable[..., Outputs] = definition) -> Outputs:
        z = with_inputs(inputs)
        values = z.values[None] if flat else z.values
        size = values.shape[2] if z.vocab_size is None else z.vocab_size
        return function(values, index, z.columns, z.log_scale, z.temperature, z.standardize, size)

    def scale(inputs: tuple[Tensor, ...]) -> tuple[Tensor | float, ...]:
        p = define(tuple(x.double() for x in inputs), lambda *fields: (log_probabilities(*fields),))[0].exp().amax(-1)
        largest = torch.ones_like(inputs[0][..., 0], dtype=torch.float64)  # over [B, T], or [N]
        if p.shape == largest.shape or flat:
            largest = p.reshape(largest.shape)
        return largest, *[1.0] * (len(inputs) - 1)

    def sequence(b: int) -> Case:
        single = sequence_of(logits, b)
        return logits_case(f"{name}, sequence {b}", single, smooth, call, definition, output_rows, batch_dimensions)

    def uncounted(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = torch.full_like(inputs[0], float("nan"))
        values[..., 1::2] = float("inf")
        size = values.shape[2] if logits.vocab_size is None else logits.vocab_size
        for b, a in (index >= 0).nonzero().tolist():
            values[b, index[b, a], :size] = inputs[0][b, index[b, a], :size]
        return values, *(x.masked_fill(index < 0, float("nan")) for x in inputs[1:])

    counted = None
    if index[:1].max() >= 0:
        counted = (int(index[0, 0]), 0) if flat else (0, int(index[0, 0]), 0)
    *_, T, V = logits.values.shape
    all_count = logits.vocab_size is None and int((index >= 0).sum()) == logits.values[..., 0].numel()
    return Case(
        name,
        inputs,
        run,
        define,
        (logits.values.dim() - 1, 2)[: len(inputs)],
        output_rows,
        batch_dimensions,
        None if flat or not splits else sequence,
        None if all_count else uncounted,
        counted,
        scale,
        memory=index.shape[0] * V + index.numel() * MOST_COLUMNS + index.shape[0] * T * V // 64,
        smooth=smooth,
    )
