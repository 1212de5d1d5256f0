"""The k most probable columns of a sequence, and every row's log-probabilities there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks
from mlot_kernels.backends import refusing
from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits, Prepared, Ranked, prepare
from mlot_kernels.native import native
from mlot_kernels.ops.rank_truncate import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator

_INPUTS = "Tensor values, Tensor index, Tensor? column_mask, Tensor? log_scale, Tensor? given"
_OPTIONS = "float[] temperatures, bool standardize, SymInt vocab_size, SymInt k, str scope, str backend"
_SAVED = "Tensor peak, Tensor log_total, Tensor expected, Tensor mean, Tensor scale, Tensor slope"
_OUTPUTS = f"(Tensor log_probabilities, Tensor columns, Tensor kept_mass, {_SAVED})"

_TRITON = "mlot_kernels.ops.rank_truncate.triton_kernels"
_MOST_TEMPERATURES = 16  # of a CUDA kernel, whose arguments they are


def _cuda_refuses(*arguments: Any) -> str | None:
    if len(arguments[5]) > _MOST_TEMPERATURES:
        return f"it takes at most {_MOST_TEMPERATURES} temperatures"
    return None


FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "rank_truncate_forward"),
    "triton": lazy(_TRITON, "forward"),
    "cuda": refusing(native("cuda", "rank_truncate_forward"), _cuda_refuses),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "rank_truncate_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "rank_truncate_backward"),
}


def _forward_fake(
    values: Tensor,
    index: Tensor,
    column_mask: Tensor | None,
    log_scale: Tensor | None,
    given: Tensor | None,
    temperatures: Sequence[float],
    standardize: bool,
    vocab_size: int,
    k: int,
    scope: str,
    backend: str,
) -> tuple[Tensor, ...]:
    (B, A), R = index.shape, len(temperatures)

    def floats(*shape: int) -> Tensor:
        return values.new_empty(shape, dtype=accumulator(values.dtype))

    columns = index.new_empty(given.shape if given is not None else (B, A, k) if scope == "token" else (B, k))
    per_row, per_temperature = (B, A), (R, B, A)
    saved = (per_row, per_temperature, per_temperature, per_row, per_row, per_row)
    return floats(R, B, A, k), columns, floats(B, A), *(floats(*shape) for shape in saved)


def _backward_fake(
    grad_log_probabilities: Tensor, grad_kept_mass: Tensor, values: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), grad_kept_mass.new_empty(grad_kept_mass.shape)


_forward = raw_operator(
    f"rank_truncate_forward({_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}", fake=_forward_fake, implementations=FORWARD
)
_backward = raw_operator(
    "rank_truncate_backward(Tensor grad_log_probabilities, Tensor grad_kept_mass, Tensor values, Tensor index, "
    f"Tensor? column_mask, Tensor columns, Tensor log_probabilities, {_SAVED}, float[] temperatures, "
    "SymInt vocab_size, str backend) -> (Tensor grad_values, Tensor grad_log_scale)",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class RankTruncate(torch.autograd.Function):
    @staticmethod
    def forward(
        values: Tensor,
        index: Tensor,
        column_mask: Tensor | None,
        log_scale: Tensor | None,
        given: Tensor | None,
        temperatures: Sequence[float],
        standardize: bool,
        vocab_size: int,
        k: int,
        scope: str,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _forward(
            values, index, column_mask, log_scale, given, temperatures, standardize, vocab_size, k, scope, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        values, index, column_mask, log_scale, _, ctx.temperatures, _, ctx.vocab_size, _, _, ctx.backend = inputs
        log_probabilities, columns, _, *saved = output
        ctx.log_scale_dtype = None if log_scale is None else log_scale.dtype
        ctx.mark_non_differentiable(columns, *saved)
        ctx.save_for_backward(values, index, column_mask, columns, log_probabilities, *saved)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_log_probabilities: Tensor, _: Tensor, grad_kept_mass: Tensor, *__: Tensor
    ) -> tuple:
        grad_values, grad_log_scale = _backward(
            grad_log_probabilities.contiguous(),
            grad_kept_mass.contiguous(),
            *saved,
            ctx.temperatures,
            ctx.vocab_size,
            ctx.backend,
        )
        scale = None if ctx.log_scale_dtype is None else grad_log_scale.to(ctx.log_scale_dtype)
        return grad_values, None, None, scale, None, None, None, None, None, None, None


_operator = differentiable_operator(
    f"rank_truncate({_INPUTS}, {_OPTIONS}) -> {_OUTPUTS}",
    fake=_forward_fake,
    function=RankTruncate,
    forward=FORWARD,
    backward=BACKWARD,
)


def rank_truncate(
    logits: Tensor | Logits,
    *,
    k: int = 50,
    scope: str = "sequence",
    also_at: Sequence[float] = (),
    backend: str | None = None,
) -> Ranked:
    """The k columns with the largest summed probability, and every counted row's log-probabilities there.

    The sum runs over the counted rows of a sequence, as in Multi-Level-OT (arXiv 2412.14528, Eq. 10 to 12, where each
    side is ranked by its own sums)::

        columns = p.sum(rows).argsort(descending=True)[:k];  log_probabilities = log_p[:, columns]

    Nothing is renormalised. The choice of columns passes no gradient on.

    Args:
        logits: ``[B, T, V]`` or ``[N, V]``, float16, bfloat16, float32 or float64, or ``Logits``, whose temperature is
            the one that ranks.
        k: how many columns, 1 to the vocabulary's size.
        scope: what is ranked together: ``"sequence"``; ``"batch"``, one ranking for all (as the published code does; a
            sequence's result then depends on its batch mates); ``"token"``, each row by itself.
        also_at: further temperatures, absolute, at which the same columns' log-probabilities are returned.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        Ranked. Columns stand in descending order of their sums, the lower index first among equals; columns that
        ``logits.columns`` leaves out come last, with log-probability ``-inf``. A NaN in a counted row makes the
        log-probabilities of all rows NaN that were ranked with it. Differentiable once with respect to ``values`` and
        ``log_scale``, through ``log_probabilities`` and ``kept_mass``.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or range; k is above the vocabulary's size.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    z = prepare(logits)
    checks.integer("k", k, 1, z.side.vocab_size, "the vocabulary's size")
    checks.choice("scope", scope, reference.SCOPES)
    return _run(z, None, k, scope, also_at, backend)


def gather_columns(
    logits: Tensor | Logits, columns: Tensor, *, also_at: Sequence[float] = (), backend: str | None = None
) -> Ranked:
    """Every counted row's log-probabilities at given columns; what ``rank_truncate`` does after ranking.

    Args:
        logits: as for ``rank_truncate``.
        columns: int64, ``[B, k]``, the same columns for all rows of a sequence, or ``[B, A, k]``; without the B
            dimension for ``[N, V]`` logits. Columns may repeat. A column that is none of ``0..vocab_size-1`` gives NaN.
        also_at: further temperatures, absolute.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        Ranked, with the columns in the order given; gradients as for ``rank_truncate``.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or range.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    z = prepare(logits)
    checks.tensor("columns", columns, "[k] or [A, k]" if z.one_sequence else "[B, k] or [B, A, k]", (torch.int64,))
    if z.one_sequence:
        columns = columns.unsqueeze(0)
    checks.sized(
        "columns", columns, (*z.side.row_index.shape[: columns.dim() - 1], columns.shape[-1]), "[B, k] or [B, A, k]"
    )
    checks.integer("the number of columns", columns.shape[-1], 1)
    checks.same_device(logits=z.side.values, columns=columns)
    return _run(z, columns, columns.shape[-1], "token" if columns.dim() == 3 else "sequence", also_at, backend)


def _run(
    z: Prepared, given: Tensor | None, k: int, scope: str, also_at: Sequence[float], backend: str | None
) -> Ranked:
    if isinstance(also_at, (str, Tensor)) or not isinstance(also_at, Sequence):
        raise TypeError(f"also_at must be a sequence of temperatures, e.g. (2.0,), got {also_at!r}")
    temperatures = [z.side.temperature, *(checks.number(f"also_at[{i}]", t, above=0) for i, t in enumerate(also_at))]
    log_probabilities, columns, kept_mass, *_ = _operator(
        *z.side[:4],
        given,
        temperatures,
        z.side.standardize,
        z.side.vocab_size,
        k,
        scope,
        backend=backend,
    )
    return Ranked(z.restore(log_probabilities, 1), z.restore(columns), z.restore(kept_mass))
