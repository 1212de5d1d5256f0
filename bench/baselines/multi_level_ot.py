"""Multi-Level-OT in eager PyTorch: as its authors published it, and the paper's loss as one would write it by hand.

Two losses of different values: the published code departs from the paper (arXiv 2412.14528) in its normalisation,
ranking, weights, temperatures and means. They serve as baselines and as oracles. The paper's loss stands here twice:
sequence by sequence for rows that differ, and batched, without a wait for the device, where all rows count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines.rows import rank_truncate
from bench.baselines.transport import pairwise_l1, pairwise_l1_by_broadcasting, sinkhorn, sinkhorn_by_matmul
from mlot_kernels import Rows

K = 50
EPSILON = 0.1
REVISIONS = ("712cfb4", "d8d298f", "77e32ae")


def published_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_labels: Tensor,
    teacher_labels: Tensor,
    *,
    revision: str = "712cfb4",
    skip_student_eos: bool = False,
    skip_teacher_eos: bool = False,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """The distillation part of the published code, step by step and with its defects.

    Like the original it gives NaN for a batch with an empty answer, and raises where one side's padded length is below
    the longest answer of the other.

    Args:
        student_logits: ``[B, Ts, Vs]``.
        teacher_logits: ``[B, Tt, Vt]``.
        student_labels, teacher_labels: ``[B, Ts]`` and ``[B, Tt]``, unshifted; the answer is one contiguous span.
        revision: ``"712cfb4"``, the latest; ``"d8d298f"`` sorts every row over its vocabulary first; ``"77e32ae"`` does
            so too and counts the transport of the last sample only.
        skip_student_eos, skip_teacher_eos: leave the last token of each answer out.

    Returns:
        ``mean(HAD) + 0.1 SL + 0.1 SD``, a scalar.
    """
    if revision not in REVISIONS:
        raise ValueError(f"revision must be one of {', '.join(REVISIONS)}, got {revision!r}")
    B = student_logits.shape[0]
    student, teacher = _normalise(student_logits), _normalise(teacher_logits)
    student_spans = [answer_span(row, skip_student_eos, ignore_index) for row in student_labels]
    teacher_spans = [answer_span(row, skip_teacher_eos, ignore_index) for row in teacher_labels]
    for i in range(B):
        student[i] = answer_first(student[i], *student_spans[i], student_temperature)
        teacher[i] = answer_first(teacher[i], *teacher_spans[i], teacher_temperature)
    longest = max(size for _, size in student_spans + teacher_spans)
    student, teacher = student[:, :longest], teacher[:, :longest]

    if revision != "712cfb4":
        student, teacher = (p.sort(dim=-1, descending=True).values for p in (student, teacher))
    student, teacher = _same_width(_rank(student), _rank(teacher))  # [B, longest, k]

    differences = []
    for i in range(B):
        size = min(student_spans[i][1], teacher_spans[i][1])
        differences.append((student[i, :size] - teacher[i, :size]).abs().sum(-1).mean())
    # Teacher and student are swapped against the paper, and both are probabilities already.
    logarithmic = -(student.softmax(-1) * teacher.log_softmax(-1)).sum(-1).mean()

    transport = student.new_zeros(())
    for i in range(B):
        cost = torch.cdist((teacher[i] / 2).softmax(-1), (student[i] / 2).softmax(-1), p=1)
        term = 0.001 * (_plan(cost, iterations=10) * cost).sum()
        transport = term if revision == "77e32ae" else transport + term
    return torch.stack(differences).mean() + 0.1 * logarithmic + 0.1 * transport


def tidied_paper_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_rows: Rows,
    teacher_rows: Rows,
    *,
    k: int = K,
    weights: tuple[float, float, float] = (1.0, 0.1, 0.1),
    transport_temperature: float = 2.0,
    epsilon: float = EPSILON,
    iterations: int = 20,
    marginals: str = "unit",
) -> Tensor:
    """The paper's loss, vectorised within a sequence: what ``MultiLevelOTLoss`` computes, and by default ``paper()``.

    Args:
        student_logits: ``[B, Ts, Vs]``.
        teacher_logits: ``[B, Tt, Vt]``.
        student_rows, teacher_rows: the counted rows, a single span per sequence.
        weights: of HAD, SL and <P, C>.
        marginals: ``"unit"``, or ``"uniform"``, whose plan has the sum 1.

    Returns:
        ``HAD + 0.1 SL + 0.1 <P, C>``, summed over rows, a mean over the sequences with a pair of rows; a scalar.
    """
    k = min(k, student_logits.shape[-1], teacher_logits.shape[-1])
    losses = []
    for i, (student_count, teacher_count) in enumerate(
        zip(student_rows.count.tolist(), teacher_rows.count.tolist(), strict=True)
    ):
        paired = min(student_count, teacher_count)
        if paired == 0:
            continue
        student = student_logits[i, student_rows.index[i, :student_count]]
        teacher = teacher_logits[i, teacher_rows.index[i, :teacher_count]]
        log_s, s_features = _kept(student, k, transport_temperature)
        log_t, t_features = _kept(teacher, k, transport_temperature)
        t = log_t[:paired].exp()
        cost = torch.cdist(t_features, s_features, p=1)
        plan = _plan(cost, iterations, epsilon)
        if marginals == "uniform":  # rows and columns scaled alike: the same iteration, another sum
            plan = plan / plan.shape[1]
        terms = (t - log_s[:paired].exp()).abs().sum(), -(t * log_s[:paired]).sum(), (plan * cost).sum()
        losses.append(sum(weight * term for weight, term in zip(weights, terms, strict=True)))
    return torch.stack(losses).mean() if losses else student_logits.sum() * 0


def dense_paper_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int = K,
    weights: tuple[float, float, float] = (1.0, 0.1, 0.1),
    transport_temperature: float = 2.0,
    epsilon: float = EPSILON,
    iterations: int = 20,
) -> Tensor:
    """``tidied_paper_loss`` where every row counts: batched, and one graph for ``torch.compile(fullgraph=True)``.

    Args:
        student_logits: ``[B, A_s, V_s]``; 16-bit ones are taken to float32.
        teacher_logits: ``[B, A_t, V_t]``; the first ``min(A_s, A_t)`` rows are paired.
        weights: of HAD, SL and <P, C>.

    Returns:
        ``HAD + 0.1 SL + 0.1 <P, C>``, summed over rows, a mean over the sequences; a scalar.
    """
    k = min(k, student_logits.shape[-1], teacher_logits.shape[-1])
    paired = min(student_logits.shape[1], teacher_logits.shape[1])
    temperatures = (1.0, transport_temperature)
    (log_s, s_features), _ = rank_truncate(student_logits, k, temperatures)  # [B, A, k] each
    (log_t, t_features), _ = rank_truncate(teacher_logits, k, temperatures)
    log_s, log_t = log_s[:, :paired], log_t[:, :paired]
    t = log_t.exp()
    # What is fastest in eager torch is not what torch.compile makes the fastest code of.
    compiling = torch.compiler.is_compiling()
    distances, solve = (pairwise_l1_by_broadcasting, sinkhorn_by_matmul) if compiling else (pairwise_l1, sinkhorn)
    (cost,) = distances(t_features.exp(), s_features.exp())
    (transported,) = solve(cost, epsilon, iterations)
    terms = (t - log_s.exp()).abs().sum((1, 2)), -(t * log_s).sum((1, 2)), transported  # [B] each
    return sum(weight * term.mean() for weight, term in zip(weights, terms, strict=True))


def _normalise(logits: Tensor) -> Tensor:
    """Every row, of prompt and padding too, over its unbiased standard deviation."""
    return logits / (logits.std(dim=-1, keepdim=True) + 1e-4)


def answer_span(labels: Tensor, skip_eos: bool, ignore_index: int) -> tuple[int, int]:
    """The row that predicts the first answer token, and the number of answer tokens.

    Args:
        labels: ``[T]``.
    """
    counted = labels != ignore_index
    size = int(counted.sum().item())
    leading = int(counted.int().argmax().item()) if size else len(labels)
    return max(leading - 1, 0), max(size - skip_eos, 0)


def answer_first(logits: Tensor, start: int, size: int, temperature: float) -> Tensor:
    """The answer's probabilities moved to row 0, zero rows behind them: ``[T, V]``."""
    answer = (logits[start : start + size] / temperature).softmax(-1)
    return torch.cat((answer, logits.new_zeros(len(logits) - len(answer), logits.shape[1])))


def _rank(probabilities: Tensor) -> Tensor:
    """The columns of the whole batch in descending order of their sums, cut to the first k."""
    order = probabilities.sum((0, 1)).argsort(descending=True)
    return probabilities.gather(2, order.expand_as(probabilities))[..., :K]


def _same_width(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Zero columns behind the narrower side, where a vocabulary has fewer than k tokens."""
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in (student, teacher))
    return student, teacher


def _kept(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the k columns with the largest sums, and probabilities there at another temperature.

    Args:
        logits: ``[A, V]``.
    """
    log_p = logits.log_softmax(-1)
    columns = log_p.detach().exp().sum(0).topk(k).indices
    flatter = logits / temperature
    return log_p[:, columns], (flatter[:, columns] - flatter.logsumexp(-1, keepdim=True)).exp()


def _plan(cost: Tensor, iterations: int, epsilon: float = EPSILON) -> Tensor:
    """The transport plan between unit marginals: ``[M, N]``, rows normalised first, columns last."""
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan
