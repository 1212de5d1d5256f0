"""The definition, in plain torch: what every other backend is held against."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlot_kernels.logits import (
    Side,
    counted_rows,
    log_probabilities,
    looked_at,
    normalise,
    row_statistics,
    scaled_rows,
    spread_rows,
    values_gradient,
)
from mlot_kernels.sides import where_both_count

KINDS = ("forward_kl", "reverse_kl", "jsd", "total_variation", "skew_kl", "skew_reverse_kl", "adaptive_kl")

END_POINTS = {
    ("jsd", 0.0): "forward_kl",
    ("jsd", 1.0): "reverse_kl",
    ("skew_kl", 0.0): "forward_kl",
    ("skew_reverse_kl", 0.0): "reverse_kl",
}
"""What a mixture of one side alone comes to."""


class Options(NamedTuple):
    """What follows the sides in the schema."""

    column_pairs: Tensor | None  # [P, 2]: a student's column and the teacher's that it meets
    kind: str
    beta: float
    skew: float
    head: float
    interpolation: float
    floor: float  # what smaller probabilities count as


def row_divergence(student: Side, teacher: Side, options: Options) -> Tensor:
    """Differentiable by autograd; ``[B, A]``."""
    log_q = log_probabilities(*student)
    log_p = log_probabilities(*teacher)
    if options.interpolation < 1:
        mixed = _mixed(student._replace(values=student.values.detach()), teacher, options.interpolation)
        log_p = looked_at(mixed.log_softmax(-1), teacher.row_index, teacher.column_mask, teacher.log_scale)
    met = columns_that_meet(student, teacher, options.column_pairs)
    log_p, log_q = met.log_p(log_p, 1), met.log_p(log_q, 0)
    if options.floor > 0:
        log_p, log_q = (_at_least(options.floor, x)[0] for x in (log_p, log_q))
    loss = _DEFINITIONS[options.kind](log_p, log_q, log_p.exp(), log_q.exp(), options)
    return where_both_count(loss, student.row_index, teacher.row_index)


def _at_least(floor: float, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The log of what p counts as, and where that is ``floor``, which has no gradient. NaN stays.

    Where p and q both count as it they add nothing to any divergence; among these are the columns that are left out.
    """
    low = log_p.exp() < floor
    return torch.where(low, math.log(floor), log_p), low


def _relative_entropy(p: Tensor, log_p: Tensor, log_m: Tensor) -> Tensor:
    """sum p log(p / m); p = 0 counts nothing."""
    absent = p == 0
    return (p * (log_p.masked_fill(absent, 0) - log_m.masked_fill(absent, 0))).sum(-1)


def _log(m: Tensor) -> Tensor:
    return m.masked_fill(m == 0, 1).log()


def _jsd(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, o: Options) -> Tensor:
    log_m = _log(o.beta * p + (1 - o.beta) * q)
    return o.beta * _relative_entropy(p, log_p, log_m) + (1 - o.beta) * _relative_entropy(q, log_q, log_m)


def _adaptive(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, o: Options) -> Tensor:
    share = share_of_forward(p.detach(), q.detach(), o.head)
    return share * _relative_entropy(p, log_p, log_q) + (1 - share) * _relative_entropy(q, log_q, log_p)


_DEFINITIONS = {
    "forward_kl": lambda log_p, log_q, p, q, o: _relative_entropy(p, log_p, log_q),
    "reverse_kl": lambda log_p, log_q, p, q, o: _relative_entropy(q, log_q, log_p),
    "jsd": _jsd,
    "total_variation": lambda log_p, log_q, p, q, o: (p - q).abs().sum(-1) / 2,
    "skew_kl": lambda log_p, log_q, p, q, o: _relative_entropy(p, log_p, _log(o.skew * p + (1 - o.skew) * q)),
    "skew_reverse_kl": lambda log_p, log_q, p, q, o: _relative_entropy(q, log_q, _log((1 - o.skew) * p + o.skew * q)),
    "adaptive_kl": _adaptive,
}


def share_of_forward(p: Tensor, q: Tensor, head: float) -> Tensor:
    """The part of |p - q| that lies in the head ``[B, A]``: the largest p whose mass is above ``head`` of the whole's.

    Equal p are in the head together. 1/2 where p = q throughout.
    """
    order = p.sort(-1, descending=True).values
    mass = order.cumsum(-1)
    last = (mass <= head * mass[..., -1:]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    difference = (p - q).abs()
    whole = difference.sum(-1)
    of_head = torch.where(p < order.gather(-1, last), 0, difference).sum(-1)
    return torch.where(whole == 0, 0.5, of_head / whole)


def _mixed(student: Side, teacher: Side, t: float) -> Tensor:
    """TAID's logits ``[B, A, V]``, (1 - t) student's + t teacher's, both scaled; equal ones stay what they are."""
    own, other = (
        scaled_rows(side.values, side.row_index, side.temperature, side.standardize, side.vocab_size)
        for side in (student, teacher)
    )
    absent = (own == float("-inf")) | (other == float("-inf"))
    own, other = own.masked_fill(absent, 0), other.masked_fill(absent, 0)
    return (own + t * (other - own)).masked_fill(absent, float("-inf"))


class Meeting(NamedTuple):
    """Which columns meet: the same ones, or those of pairs. Side 0 is the student, side 1 the teacher."""

    columns: tuple[Tensor | None, Tensor | None]  # [P] of either side; None: all, in their order
    outside: Tensor | None  # [P], which pairs name a column that does not exist
    left_out: Tensor | None  # [P], at which columns a side does not look

    def at(self, x: Tensor, side: int) -> Tensor:
        """``x`` ``[B, A, V]`` at its columns, ``[B, A, P]``."""
        columns = self.columns[side]
        return x if columns is None else x[..., columns]

    def log_p(self, x: Tensor, side: int) -> Tensor:
        """The same of log-probabilities: -inf where either side does not look, NaN where there is no column."""
        x = self.at(x, side)
        if self.left_out is not None:
            x = x.masked_fill(self.left_out, float("-inf"))
        return x if self.outside is None else x.masked_fill(self.outside, float("nan"))

    def spread(self, H: Tensor, side: int, width: int) -> Tensor:
        """``H`` ``[B, A, P]`` added up at its columns, ``[B, A, width]``."""
        columns = self.columns[side]
        return H if columns is None else H.new_zeros(*H.shape[:-1], width).index_add(-1, columns, H)


def columns_that_meet(student: Side, teacher: Side, column_pairs: Tensor | None) -> Meeting:
    sides = (student, teacher)
    columns: tuple[Tensor | None, Tensor | None] = (None, None)
    outside = None
    if column_pairs is not None:
        existing = [column_pairs[:, i].clamp(0, side.vocab_size - 1) for i, side in enumerate(sides)]
        outside = (torch.stack(existing, 1) != column_pairs).any(1)
        columns = existing[0], existing[1]
    masks = [
        ~side.column_mask[: side.vocab_size] if column is None else ~side.column_mask[column]
        for side, column in zip(sides, columns, strict=True)
        if side.column_mask is not None
    ]
    left_out = None if not masks else masks[0] if len(masks) == 1 else masks[0] | masks[1]
    return Meeting(columns, outside, left_out)


# The explicit forward and backward: what a kernel computes, step by step.


class Slopes(NamedTuple):
    """Of pairs of columns: the loss's terms, and H' of either side, H = H' + kappa times its own probability.

    H = dloss/dlog p. Where every column meets, kappa adds nothing to the gradient of the logits, and without it that
    is exactly 0 for equal rows; README.md has the formulas.
    """

    loss: Tensor  # [B, A, P]
    teacher: Tensor  # [B, A, P]
    student: Tensor
    teacher_kappa: Tensor | float  # [B, A]
    student_kappa: Tensor | float


def slopes(log_p: Tensor, log_q: Tensor, share: Tensor, o: Options) -> Slopes:
    p, q = log_p.exp(), log_q.exp()
    d = (log_p - log_q).masked_fill((p == 0) & (q == 0), 0)  # log (p / q)
    if o.kind == "total_variation":
        difference = p - q
        sign = torch.where(difference.isnan(), difference, difference.sign()) / 2  # sign of NaN is 0
        return Slopes(sign * difference, sign * p, -sign * q, 0.0, 0.0)
    if o.kind == "forward_kl":
        loss = _times(p, d)
        return Slopes(loss, loss, q - p, 1.0, -1.0)
    if o.kind == "reverse_kl":
        loss = _times(q, -d)
        return Slopes(loss, p - q, loss, -1.0, 1.0)
    if o.kind == "adaptive_kl":
        share = share[..., None]
        forward_kl, reverse_kl = _times(p, d), _times(q, -d)
        teacher = share * forward_kl + (1 - share) * (p - q)
        student = share * (q - p) + (1 - share) * reverse_kl
        kappa = (2 * share - 1).squeeze(-1)
        return Slopes(share * forward_kl + (1 - share) * reverse_kl, teacher, student, kappa, -kappa)
    weight = {"jsd": o.beta, "skew_kl": o.skew, "skew_reverse_kl": 1 - o.skew}[o.kind]
    u, w = over_mixture(d, weight)
    of_p, of_q = _times(p, u), _times(q, w)
    if o.kind == "jsd":
        teacher, student = o.beta * of_p, (1 - o.beta) * of_q
        return Slopes(teacher + student, teacher, student, 0.0, 0.0)
    rest = 1 - o.skew
    if o.kind == "skew_kl":
        return Slopes(of_p, of_p - _times(p, o.skew * u.expm1()), -_times(q, rest * u.expm1()), rest, -rest)
    return Slopes(of_q, -_times(p, rest * w.expm1()), of_q - _times(q, o.skew * w.expm1()), -rest, rest)


def over_mixture(d: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """log (p / m) and log (q / m) for m = weight p + (1 - weight) q, from d = log (p / q); 0 where that is 0."""
    larger = d > 0  # p, else q
    of_smaller = torch.where(larger, d.new_full((), 1 - weight), d.new_full((), weight))  # two numbers: float32
    less = of_smaller * (-d.abs()).expm1()
    rest = 1 - of_smaller + of_smaller * (-d.abs()).exp()  # which 1 + less would cancel to where it is small
    over_larger = torch.where(less > -0.5, torch.log1p(less.clamp(min=-0.5)), rest.log())  # log (m / the larger one)
    return torch.where(larger, 0, d) - over_larger, torch.where(larger, -d, 0) - over_larger


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p x, 0 where p is."""
    return torch.where(p == 0, p, p * x)


class _Distribution(NamedTuple):
    below: Tensor  # x - m, [B, A, vocab_size]
    log_q: Tensor  # of the row's softmax
    peak: Tensor  # [B, A], as are the rest
    log_total: Tensor
    mean: Tensor
    scale: Tensor
    slope: Tensor


def _distribution(side: Side) -> _Distribution:
    x = counted_rows(side.values, side.row_index)[..., : side.vocab_size]
    statistics = row_statistics(x, side.standardize)
    log_q, log_total, _ = normalise(x, statistics.peak, statistics.scale, side.temperature)
    peak, mean, scale, slope = statistics
    return _Distribution(x - peak[..., None], log_q, peak, log_total, mean, scale, slope)


class _Pair(NamedTuple):
    """What forward and backward share, of pairs of rows."""

    sides: tuple[_Distribution, _Distribution]
    softmax: tuple[Tensor, Tensor]  # [B, A, V]; the second is what the student is held against: mostly the teacher's
    log_total: Tensor  # [B, A], of the second one's logits, relative to the rows' peaks
    share: Tensor  # [B, A]
    met: Meeting
    loss: Tensor  # [B, A]
    H: tuple[Tensor, Tensor]  # [B, A, P], without kappa where every column meets and there is no floor
    kappa: tuple[Tensor, Tensor]  # [B, A], of the gradient by the log scale; 0 where it is in H


def _compare(student: Side, teacher: Side, o: Options) -> _Pair:
    sides = _distribution(student), _distribution(teacher)
    log_target, log_total = sides[1].log_q, sides[1].log_total
    if o.interpolation < 1:
        own, other = (
            d.below / (side.temperature * d.scale[..., None]) for d, side in zip(sides, (student, teacher), strict=True)
        )
        absent = (own == float("-inf")) | (other == float("-inf"))
        mixed = (own + o.interpolation * (other - own)).masked_fill(absent, float("-inf"))
        log_total = mixed.logsumexp(-1)
        log_target = mixed - log_total[..., None]
    met = columns_that_meet(student, teacher, o.column_pairs)
    log_q = met.log_p(looked_at(sides[0].log_q, student.row_index, None, student.log_scale), 0)
    log_p = met.log_p(looked_at(log_target, teacher.row_index, None, teacher.log_scale), 1)
    low: tuple[Tensor, Tensor] | None = None
    if o.floor > 0:
        (log_q, low_q), (log_p, low_p) = _at_least(o.floor, log_q), _at_least(o.floor, log_p)
        low = low_q, low_p
    p, q = log_p.exp(), log_q.exp()
    share = torch.ones_like(log_total)
    if o.kind == "adaptive_kl":
        share = share_of_forward(p, q, o.head)
    s = slopes(log_p, log_q, share, o)
    H, kappa = (s.student, s.teacher), tuple(torch.ones_like(share) * k for k in (s.student_kappa, s.teacher_kappa))
    if o.column_pairs is not None or met.left_out is not None or low is not None:
        H = H[0] + kappa[0][..., None] * q, H[1] + kappa[1][..., None] * p
        if low is not None:
            H = H[0].masked_fill(low[0], 0), H[1].masked_fill(low[1], 0)
        kappa = torch.zeros_like(share), torch.zeros_like(share)
        loss = s.loss.sum(-1)
    else:  # (q - p) adds up to nothing, and makes every term 0 or more, and of second order where p is near q
        loss = (s.loss + kappa[1][..., None] * (q - p)).sum(-1) + kappa[1] * (_mass(teacher, p) - _mass(student, q))
    softmax = sides[0].log_q.exp(), log_target.exp()
    return _Pair(sides, softmax, log_total, share, met, loss, H, (kappa[0], kappa[1]))


def _mass(side: Side, like: Tensor) -> Tensor | float:
    """What the row's probabilities add up to where all columns are looked at."""
    return 1.0 if side.log_scale is None else side.log_scale.to(like.dtype).exp()


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The divergence, and row scalars for its gradient; arguments as in the schema."""
    student, teacher = Side(*arguments[:7]), Side(*arguments[7:14])
    pair = _compare(student, teacher, Options(*arguments[14:]))
    saved: list[Tensor] = []
    for i, side in enumerate((student, teacher)):
        d, H = pair.sides[i], pair.H[i]
        below = d.below.masked_fill(d.below == float("-inf"), 0)
        total = H.sum(-1)
        moment = (H * pair.met.at(below, i)).sum(-1) - total * (pair.softmax[i] * below).sum(-1)
        scalars = (d.peak, d.log_total, d.mean, d.scale, d.slope, total, moment)
        saved += [scalar.masked_fill(side.row_index < 0, 0) for scalar in scalars]
    saved += [scalar.masked_fill(student.row_index < 0, 0) for scalar in (pair.share, pair.log_total)]
    return where_both_count(pair.loss, student.row_index, teacher.row_index), *saved


def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """``g = H - softmax sum(H)``; a side that is not needed is empty."""
    sides = Side(*arguments[:7]), Side(*arguments[7:14])
    options, saved, needed = Options(*arguments[14:21]), arguments[21:37], arguments[37:]
    pair = _compare(*sides, options)
    gradients: list[Tensor] = []
    for i, side in enumerate(sides):
        if not needed[i]:
            gradients += [side.values.new_empty(0), grad.new_empty(0)]
            continue
        d, (total, moment) = pair.sides[i], saved[7 * i + 5 : 7 * i + 7]
        g = pair.met.spread(pair.H[i], i, side.vocab_size) - pair.softmax[i] * total[..., None]
        part = grad * options.interpolation if i == 1 else grad
        behind = sides[1 - i].row_index < 0
        dx = values_gradient(part[..., None] * g, part * moment, d.below, d.mean, d.scale, d.slope, side.temperature)
        log_scale = torch.zeros_like(total) if side.log_scale is None else side.log_scale.to(total.dtype)
        by_log_scale = grad * (total + pair.kappa[i] * log_scale.exp())
        gradients += [
            spread_rows(dx.masked_fill(behind[..., None], 0), side.values, side.row_index),
            by_log_scale.masked_fill(behind | (side.row_index < 0), 0),
        ]
    return tuple(gradients)
