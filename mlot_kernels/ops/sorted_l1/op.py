"""The L1 distance of two rows of probabilities, each in descending order, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlot_kernels import checks, sides
from mlot_kernels.checks import accumulator
from mlot_kernels.logits import Logits
from mlot_kernels.native import native
from mlot_kernels.ops.sorted_l1 import reference
from mlot_kernels.registry import differentiable_operator, lazy, once_differentiable, raw_operator

_SAVED = ", ".join(
    f"Tensor {side}_{scalar}"
    for side in ("student", "teacher")
    for scalar in ("peak", "log_total", "mean", "scale", "slope", "total", "moment", "steps")
)
_OPTIONS = "str ties, SymInt top_k, str tail"

_TRITON = "mlot_kernels.ops.sorted_l1.triton_kernels"

FORWARD = {
    "reference": reference.forward,
    "cpu": native("cpu", "sorted_l1_forward"),
    "triton": lazy(_TRITON, "forward"),
    "cuda": native("cuda", "sorted_l1_forward"),
}
BACKWARD = {
    "reference": reference.backward,
    "cpu": native("cpu", "sorted_l1_backward"),
    "triton": lazy(_TRITON, "backward"),
    "cuda": native("cuda", "sorted_l1_backward"),
}


def _forward_fake(student_values: Tensor, student_index: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    teacher_values = rest[5]
    student, teacher = (accumulator(values.dtype) for values in (student_values, teacher_values))
    outputs = [student_values.new_empty(student_index.shape, dtype=torch.promote_types(student, teacher))]
    for dtype in (student, teacher):
        outputs += [student_values.new_empty(student_index.shape, dtype=dtype) for _ in range(7)]
        outputs.append(student_values.new_empty((*student_index.shape, *reference.STEPS), dtype=dtype))
    return tuple(outputs)


def _backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return sides.fake_gradients(arguments, arguments[33:35])


_forward = raw_operator(
    f"sorted_l1_forward({sides.SCHEMA}, {_OPTIONS}, str backend) -> (Tensor loss, {_SAVED})",
    fake=_forward_fake,
    implementations=FORWARD,
)
_backward = raw_operator(
    f"sorted_l1_backward(Tensor grad, {sides.SCHEMA}, {_OPTIONS}, {_SAVED}, bool student_needed, bool teacher_needed, "
    f"str backend) -> {sides.GRADIENTS_SCHEMA}",
    fake=_backward_fake,
    implementations=BACKWARD,
)


class SortedL1(torch.autograd.Function):
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
        ties: str,
        top_k: int,
        tail: str,
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
            ties,
            top_k,
            tail,
            backend,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:4], *inputs[7:11], *output[1:])
        ctx.student_options, ctx.teacher_options = inputs[4:7], inputs[11:14]
        ctx.options, ctx.backend = inputs[14:17], inputs[17]

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
            *ctx.options,
            *saved[8:],
            *needed,
            ctx.backend,
        )
        return *sides.gradients_of_inputs(gradients, needed, (saved[3], saved[7])), *(None,) * 4


_operator = differentiable_operator(
    f"sorted_l1({sides.SCHEMA}, {_OPTIONS}, str backend) -> (Tensor loss, {_SAVED})",
    fake=_forward_fake,
    function=SortedL1,
    forward=FORWARD,
    backward=BACKWARD,
)


def sorted_l1(
    student: Tensor | Logits,
    teacher: Tensor | Logits,
    *,
    ties: str = "mean",
    top_k: int | None = None,
    tail: str = "bucket",
    backend: str | None = None,
) -> Tensor:
    """The L1 distance of each pair of rows of probabilities, sorted in descending order.

    The token-wise term of Universal Logit Distillation (arXiv 2402.12030), which is the Wasserstein-1 distance of the
    two rows' values times their number; the smaller vocabulary is padded with probabilities of 0::

        loss = sum_i |sort(p_student)_i - sort(p_teacher)_i|

    Args:
        student, teacher: ``[B, T, V]`` or ``[N, V]``, float16, bfloat16, float32 or float64, or ``Logits``; the two may
            differ in T, V and dtype. Row a of one side meets row a of the other: their rows have the same shape and
            count, as those that ``pair`` returns. Columns that ``columns`` leaves out are not there.
        ties: whose gradient equal logits get: ``"mean"``: each the mean of their signs, which does not depend on the
            order of the vocabulary; ``"stable"``: the lower index is the larger, as in a stable sort.
        top_k: compare the ``top_k`` largest probabilities of each side only; None: all.
        tail: what becomes of the others: ``"bucket"``: adds ``|their sum on one side - their sum on the other|``, a
            lower bound of their distance and equal to it where the two tails do not cross; ``"drop"``: they do not
            count.
        backend: run on this backend or raise; by default the best one for the device.

    Returns:
        ``[B, A]`` (``[N]`` for ``[N, V]``), float32 (float64 where either side is float64), from 0 to 2 without log
        scales; 0 beyond the counted rows, NaN where only one of two rows counts or either holds NaN. Differentiable
        once with respect to both sides' ``values`` and ``log_scale``; where two sorted probabilities are equal the
        gradient is 0.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, device or value.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    s, t = sides.prepare_pair(student, teacher)
    checks.choice("ties", ties, reference.TIES)
    checks.choice("tail", tail, reference.TAILS)
    if top_k is not None:
        checks.integer("top_k", top_k, 1)
    most = max(s.side.vocab_size, t.side.vocab_size)
    loss = _operator(*s.side, *t.side, ties, most if top_k is None else top_k, tail, backend=backend)[0]
    return s.restore(loss)
