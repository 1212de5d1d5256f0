"""TRL's own ``GKDTrainer.generalized_jsd_loss`` (trl.experimental.gkd, 1.16), row by row."""

from __future__ import annotations

from torch import Tensor

from bench.baselines.rows import wide


def trl_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> tuple[Tensor]:
    """``row_divergence(..., kind="jsd")`` as TRL computes it, in float32 as its trainer hands the logits over.

    Args:
        student, teacher: ``[B, T, V]``.

    Returns:
        ``[B, T]``.
    """
    try:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    except ImportError as error:
        raise ImportError("this baseline needs TRL 1.16: pip install trl==1.16.0") from error
    terms = GKDTrainer.generalized_jsd_loss(wide(student), wide(teacher), beta=beta, reduction="none")
    return (terms.sum(-1),)
