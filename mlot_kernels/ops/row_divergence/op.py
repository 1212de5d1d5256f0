"""A divergence of each pair of rows of two sides that share columns, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks, sides
from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits, Prepared
from mlot_kernels.native import native
from mlot_kernels.ops.row_divergence import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator

_OPTIONS = "Tensor? column_pairs, str kind, float beta, float skew, float head, float interpolation, float floor"
_SAVED = ", ".join(
    f"Tensor {side}_{scalar}"
    for side in ("student", "teacher")
    for scalar in ("peak", "log_total", "mean", "scale", "slope", "total", "moment")
)
_SAVED += ", Tensor share, Tensor target_log_total"

_TRITON = "mlot_kernels.ops.row_divergence.triton_kernels"

FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "row_divergence_forward"),
    "triton": lazy(_TRITON, "forward"),
    "cuda": native("cuda", "row_divergence_forward"),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "row_divergence_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "row_divergence_backward"),
}


def _forward_fake(student_values: Tensor, student_index: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    teacher_values = rest[5]
    student, teacher = (accumulator(values.dtype) for values in (student_values, teacher_values))
    both = torch.promote_types(student, teacher)
    dtypes = (both, *(student,) * 7, *(teacher,) * 7, both, both)
    return tuple(student_values.new_empty(student_index.shape, dtype=dtype) for dtype in dtypes)


def _backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return sides.fake_gradients(arguments, arguments[37:39])


_forward = raw_operator(
    f"row_divergence_forward({sides.SCHEMA}, {_OPTIONS}, str backend) -> (Tensor loss, {_SAVED})",
    fake=_forward_fake,
    implementations=FORWARD,
)
_backward = raw_operator(
    f"row_divergence_backward(Tensor grad, {sides.SCHEMA}, {_OPTIONS}, {_SAVED}, bool student_needed, "
    f"bool teacher_needed, str backend) -> {sides.GRADIENTS_SCHEMA}",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class RowDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        student_values: Tensor,
        student_index: Tensor,
        student_column_mask: Tensor | None,
        student_log_scale: Tensor | None,
        student_temperature: float,
        student_standardize: bool,
        student_vocab_size: int,
        teacher_values: Tensor,
        teacher_index: Tensor,
        teacher_column_mask: Tensor | None,
        teacher_log_scale: Tensor | None,
        teacher_temperature: float,
        teacher_standardize: bool,
        teacher_vocab_size: int,
        column_pairs: Tensor | None,
        kind: str,
        beta: float,
        skew: float,
        head: float,
        interpolation: float,
        floor: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return _forward(
            student_values,
            student_index,
            student_column_mask,
            student_log_scale,
            student_temperature,
            student_standardize,
            student_vocab_size,
            teacher_values,
            teacher_index,
            teacher_column_mask,
            teacher_log_scale,
            teacher_temperature,
            teacher_standardize,
            teacher_vocab_size,
            column_pairs,
            kind,
            beta,
            skew,
            head,
            interpolation,
            floor,
            backend,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:4], *inputs[7:11], inputs[14], *output[1:])
        ctx.student_options, ctx.teacher_options = inputs[4:7], inputs[11:14]
        ctx.options, ctx.backend = inputs[15:21], inputs[21]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        needed = needs[0] or needs[3], needs[7] or needs[10]
        gradients = _backward(
            grad.contiguous(),
            *saved[:4],
            *ctx.student_options,
            *saved[4:8],
            *ctx.teacher_options,
            saved[8],
            *ctx.options,
            *saved[9:],
            *needed,
            ctx.backend,
        )
        return *sides.gradients_of_inputs(gradients, needed, (saved[3], saved[7])), *(None,) * 8


_operator = differentiable_operator(
    f"row_divergence({sides.SCHEMA}, {_OPTIONS}, str backend) -> (Tensor loss, {_SAVED})",
    fake=_forward_fake,
    function=RowDivergence,
    forward=FORWARD,
    backward=BACKWARD,
)


def row_divergence(
    student: Tensor | Logits,
    teacher: Tensor | Logits,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    head: float = 0.5,
    interpolation: float = 1.0,
    floor: float = 0.0,
    column_pairs: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A divergence of each pair of rows, over the columns that both sides look at.

    With q the student's probabilities, p the teacher's, and KL(a | b) = sum a log(a / b)::

        forward_kl          KL(p | q)
        reverse_kl          KL(q | p)
        jsd                 beta KL(p | m) + (1 - beta) KL(q | m),  m = beta p + (1 - beta) q
                            as GKD (arXiv 2306.13649) and TRL have it; KL(p | q) for beta 0, KL(q | p) for 1
        total_variation     sum |p - q| / 2
        skew_kl             KL(p | skew p + (1 - skew) q)                        DistiLLM (arXiv 2402.03898)
        skew_reverse_kl     KL(q | (1 - skew) p + skew q)
        adaptive_kl         w KL(p | q) + (1 - w) KL(q | p)                      AKL (arXiv 2404.02657)
                            w, a constant: the part of sum |p - q| at the teacher's largest probabilities, the fewest
                            whose sum is above head of all; equal ones together

    Args:
        student, teacher: ``[B, T, V]`` or ``[N, V]``, float16, bfloat16, float32 or float64, or ``Logits``; the two may
            differ in T and dtype, and with ``column_pairs`` in their vocabularies. Row a of one side meets row a of the
            other: their rows have the same shape and count, as those that ``pair`` returns. Under temperatures nothing
            is multiplied by their square. Where columns are left out or a log scale is given, p and q are what is
            there: their sums may differ, and a KL may be negative.
        kind: one of the above.
        beta: of the jsd, 0 to 1.
        skew: of the skewed ones, from 0, which makes a KL of them, to below 1.
        head: of adaptive_kl, from 0 to below 1.
        interpolation: TAID's t (arXiv 2501.16937), above 0 and up to 1: the student is held against the softmax of
            (1 - t) its own logits, which are a constant there, + t the teacher's, each divided by its temperature.
            ``forward_kl`` and whole vocabularies only.
        floor: from 0 to below 1: what p and q that are smaller count as, 0 among them; they pass no gradient on, as in
            ``log(p.clamp_min(floor))``. Then p and q are no distributions, and a KL may be negative. Neither for
            ``adaptive_kl`` nor beside an interpolation.
        column_pairs: int64 ``[P, 2]``, a student's column and the teacher's that it meets; the sum goes over the pairs.
            None: every column meets the one of the same number, and the vocabularies have one size. A pair that names
            a column that does not exist makes the result NaN.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        ``[B, A]`` (``[N]`` for ``[N, V]``), float32 (float64 where either side is float64); 0 beyond the counted rows,
        NaN where only one of two rows counts or either holds NaN, inf where a KL is. Differentiable once with respect
        to both sides' ``values`` and ``log_scale``. For rows that are equal to the bit it is 0, and so is its gradient
        by the logits where every column meets and the floor is 0.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    s, t = sides.prepare_pair(student, teacher)
    _check(s, t, kind, interpolation, floor, column_pairs)
    beta = checks.number("beta", beta, least=0, most=1)
    skew, head = (checks.number(name, value, least=0, below=1) for name, value in (("skew", skew), ("head", head)))
    kind = reference.END_POINTS.get((kind, beta if kind == "jsd" else skew), kind)
    numbers = beta, skew, head, float(interpolation), float(floor)
    loss = _operator(*s.side, *t.side, column_pairs, kind, *numbers, backend=backend)[0]
    return s.restore(loss)


def _check(
    s: Prepared, t: Prepared, kind: str, interpolation: float, floor: float, column_pairs: Tensor | None
) -> None:
    checks.same_device(student=s.side.values, column_pairs=column_pairs)
    checks.choice("kind", kind, reference.KINDS)
    if column_pairs is not None:
        checks.tensor("column_pairs", column_pairs, "[P, 2]", (torch.int64,))
        checks.sized("column_pairs", column_pairs, (column_pairs.shape[0], 2), "[P, 2]")
    elif s.side.vocab_size != t.side.vocab_size:
        raise ValueError(
            "student and teacher must have vocabularies of one size, got "
            f"{s.side.vocab_size} and {t.side.vocab_size}; pass column_pairs, which say what column meets which, or "
            "take a loss for different vocabularies, such as sorted_l1"
        )
    has_floor = checks.number("floor", floor, least=0, below=1) > 0
    if has_floor and kind == "adaptive_kl":
        raise ValueError(
            f"floor above 0 needs another kind than 'adaptive_kl', got {floor}; leave it out, or take 'forward_kl' or "
            "'reverse_kl', of which 'adaptive_kl' is a mean"
        )
    if checks.number("interpolation", interpolation, above=0, most=1) == 1:
        return
    if has_floor:
        raise ValueError(
            f"floor above 0 needs an interpolation of 1, got {floor} and {interpolation}; leave one of them out"
        )
    if kind != "forward_kl":
        raise ValueError(f"interpolation below 1 needs kind='forward_kl', got {kind!r} and {interpolation}")
    if column_pairs is not None:
        raise ValueError("interpolation below 1 mixes the logits of equal vocabularies; leave column_pairs out")
