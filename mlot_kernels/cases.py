"""What a case is: one call of an operator, as the contract tests make it. And inputs of a real size for the benchmarks.

Each operator's ``cases.py`` has ``cases(dtype, device) -> list[Case]``, edge cases first, and
``large(dtype, device, seed, **sizes)``, the tensors of one call of a real size. Where the operator has Triton kernels,
``large_cases(dtype, device, **sizes) -> list[Case]`` are calls of a real size as users make them, which ``tune`` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlot_kernels.logits import Logits, counted_rows, log_probabilities, prepare, row_statistics
from mlot_kernels.rows import Rows

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
        excess: for outputs that are indices, which have no gradient and may differ where choices are nearly as good:
            ``(inputs, outputs) -> `` by how much each choice is worse than the best, inf where it is no choice at all.
        waits: by design the call waits for the device.
        roundings: of a gradient to its input's dtype: one for each operator that adds to it, and one for each sum.
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
    excess: Callable[[tuple[Tensor, ...], Outputs], Tensor] | None = None
    waits: bool = False
    roundings: int = 1


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
    yield "many rows", Logits(randn(2, 100, 1024)), False
    yield "two tiles and a rest", Logits(randn(1, 2, 2 * 4096 + 5)), False
    yield "large and flat", Logits((1e4 + randn(1, 2, 100).float() * 1e-3).to(dtype)), False
    yield "one-hot", Logits((torch.eye(8)[None] * 60).to(dtype).to(device)), False
    yield "all equal", Logits(torch.zeros(1, 2, 16, dtype=dtype, device=device)), False
    yield "all equal, standardized", Logits(torch.ones(1, 2, 16, dtype=dtype, device=device), standardize=True), False
    behind = torch.arange(20, device=device) >= 15
    yield "-inf columns", Logits(randn(2, 3, 20).masked_fill(behind, float("-inf"))), False
    masked = randn(2, 3, 20).masked_fill(~behind, float("-inf"))
    yield "-inf columns, standardized", Logits(masked, standardize=True), False
    yield "mostly -inf, standardized", Logits(masked[..., 13:].contiguous(), standardize=True), False


def large_logits(
    dtype: torch.dtype, device: str, seed: int, sequences: int, rows: int, vocabulary: int, context: int = 8
) -> Tensor:
    """Logits ``[sequences, rows, vocabulary]`` with what makes a language model's hard: frequent tokens lead in every
    row, rows differ in few directions, some tokens stand out, and the mean is not 0. Standard deviation about 2.2.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(draw: Callable[..., Tensor], *shape: int) -> Tensor:
        return draw(*shape, generator=generator, device=device)

    order = torch.randperm(vocabulary, generator=generator, device=device)
    frequency = 5 - torch.log1p(order.to(torch.float32))  # Zipf's law
    weight = random(torch.randn, context, vocabulary) * (2 / context**0.5)
    tokens = torch.randint(vocabulary, (sequences, rows, 24), generator=generator, device=device)
    height = 10 * random(torch.rand, sequences, rows, 24)
    values = torch.empty(sequences, rows, vocabulary, dtype=dtype, device=device)
    for b in range(sequences):  # one at a time: the float32 form of all of them may not fit
        wide = torch.addmm(frequency, random(torch.randn, rows, context), weight)
        values[b] = wide.scatter_add_(1, tokens[b], height[b])
    return values


def large_pair(
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    *,
    sequences: int,
    rows: int,
    student_vocabulary: int,
    teacher_vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's logits, ``[sequences, rows, vocabulary]``."""
    return (
        large_logits(dtype, device, 2 * seed, sequences, rows, student_vocabulary),
        large_logits(dtype, device, 2 * seed + 1, sequences, rows, teacher_vocabulary),
    )


def large_features(
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    *,
    problems: int,
    student_rows: int,
    teacher_rows: int,
    width: int,
) -> tuple[Tensor, ...]:
    """Probabilities of the teacher ``[problems, teacher_rows, width]``, then of the student."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (2 * torch.randn(problems, rows, width, generator=generator)).softmax(-1).to(dtype).to(device)
        for rows in (teacher_rows, student_rows)
    )


def _narrowed(rows: Rows, width: int) -> Rows:
    return Rows(rows.index[:, :width], rows.count, rows.span[:, :width], rows.spans, rows.length)


def sequence_of(logits: Logits, b: int) -> Logits:
    """Sequence ``b`` of ``[B, T, V]`` logits alone, as a batch of one."""
    rows = logits.rows
    if rows is not None:
        index, count, span, spans = (x[b : b + 1] for x in (rows.index, rows.count, rows.span, rows.spans))
        rows = Rows(index, count, span, spans, rows.length)
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
    """A case with one ``Logits``; ``definition`` takes the fields as ``logits.log_probabilities`` does."""
    return sides_case(
        name,
        (logits,),
        smooth,
        lambda sides, backend: call(sides[0], backend),
        lambda side: definition(*side),
        output_rows,
        batch_dimensions,
        splits,
    )


def sides_case(
    name: str,
    sides: tuple[Logits, ...],
    smooth: bool,
    call: Callable[[tuple[Logits, ...], str | None], Outputs],
    definition: Callable[..., Outputs],
    output_rows: tuple[int, ...],
    batch_dimensions: tuple[int, ...],
    splits: bool = True,
) -> Case:
    """A case of an operator with one or two ``Logits``. Differentiable inputs: each side's values, then its log scale.

    Args:
        call: the public function.
        definition: takes a ``logits.Side`` for each side.
        output_rows, batch_dimensions: for ``[B, ...]`` outputs, also where the logits are ``[N, V]``.
        splits: a sequence's result is its own.
    """
    flat = sides[0].values.dim() == 2
    index = [prepare(z).side.row_index for z in sides]
    inputs = tuple(x for z in sides for x in (z.values, z.log_scale) if x is not None)
    starts = [sum(1 + (z.log_scale is not None) for z in sides[:i]) for i in range(len(sides))]

    def with_inputs(inputs: tuple[Tensor, ...]) -> tuple[Logits, ...]:
        return tuple(
            replace(z, values=inputs[i], log_scale=None if z.log_scale is None else inputs[i + 1])
            for z, i in zip(sides, starts, strict=True)
        )

    def run(inputs: tuple[Tensor, ...], backend: str | None) -> Outputs:
        outputs = call(with_inputs(inputs), backend)
        return tuple(y.unsqueeze(d) for y, d in zip(outputs, batch_dimensions, strict=True)) if flat else outputs

    def define(inputs: tuple[Tensor, ...]) -> Outputs:
        return definition(*(prepare(z).side for z in with_inputs(inputs)))

    def scale(inputs: tuple[Tensor, ...]) -> tuple[Tensor | float, ...]:
        scales: list[Tensor | float] = []
        for z in with_inputs(tuple(x.double() for x in inputs)):
            side = prepare(z).side
            largest = log_probabilities(*side).exp().amax(-1)  # [B, A]
            # By the values themselves it is larger where they are divided by less than 1.
            rows = counted_rows(side.values, side.row_index)[..., : side.vocab_size]
            divisor = side.temperature * row_statistics(rows, side.standardize).scale
            largest = largest / divisor.clamp(max=1)
            shape = z.values.shape[:-1]
            scales.append(largest.reshape(shape) if largest.numel() == z.values[..., 0].numel() else 1.0)
            scales += [] if z.log_scale is None else [1.0]
        return tuple(scales)

    def sequence(b: int) -> Case:
        alone = tuple(sequence_of(z, b) for z in sides)
        return sides_case(f"{name}, sequence {b}", alone, smooth, call, definition, output_rows, batch_dimensions)

    def uncounted(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        poisoned: list[Tensor] = []
        for z, rows in zip(with_inputs(inputs), index, strict=True):
            values = torch.full_like(z.values, float("nan"))
            values[..., 1::2] = float("inf")
            for b, a in (rows >= 0).nonzero().tolist():
                values[b, rows[b, a], : z.vocab_size] = z.values[b, rows[b, a], : z.vocab_size]
            poisoned.append(values)
            if z.log_scale is not None:
                poisoned.append(z.log_scale.masked_fill(rows < 0, float("nan")))
        return tuple(poisoned)

    counted = None
    if index[0][:1].max() >= 0:
        counted = (int(index[0][0, 0]), 0) if flat else (0, int(index[0][0, 0]), 0)
    all_count = all(
        z.vocab_size is None and int((rows >= 0).sum()) == z.values[..., 0].numel()
        for z, rows in zip(sides, index, strict=True)
    )
    values_rows = sides[0].values.dim() - 1
    memory = 0
    for z, rows in zip(sides, index, strict=True):
        memory += rows.shape[0] * z.values.shape[-1] + rows.numel() * MOST_COLUMNS + z.values.numel() // 64
    return Case(
        name,
        inputs,
        run,
        define,
        tuple(values_rows if i in starts else 2 for i in range(len(inputs))),
        output_rows,
        batch_dimensions,
        None if flat or not splits else sequence,
        None if all_count else uncounted,
        counted,
        scale,
        memory=memory,
        smooth=smooth,
    )
