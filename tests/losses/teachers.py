"""Teachers of the losses' tests that come without their logits, and what they stand for."""

import torch
from torch import Tensor

from mlot_kernels import TeacherHidden, TeacherTopK, divergence_loss, multi_level_ot_loss, uld_loss
from mlot_kernels.ops.row_divergence.reference import KINDS
from tests.losses.examples import labels_of, logits_of

B, T, V, K = 2, 11, 23, 5
INFINITE = ("reverse_kl", "adaptive_kl")  # where the teacher has probability 0 and the student has not
LABELS = labels_of(T, (2, 4, 8, 2), (1, 9)), labels_of(T, (1, 5, 8, 3), (4, 4))
LOSSES = {
    "uld": (uld_loss, {}),
    "multi_level_ot": (multi_level_ot_loss, {"k": 6}),
    **{kind: (divergence_loss, {"kind": kind}) for kind in KINDS},
}


def hidden_of(width: int = V, **options) -> tuple[TeacherHidden, Tensor]:
    """A teacher as hidden states, and its logits."""
    hidden, weight, bias = torch.randn(B, T, 7), torch.randn(width, 7), torch.randn(width)
    logits = hidden @ weight.T + bias
    logits = logits * options.get("logit_scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    return TeacherHidden(hidden, weight, bias, **options), logits


def top_k_of(tail: str, logits: Tensor | None = None, k: int = K) -> tuple[TeacherTopK, Tensor]:
    """A teacher as a top-k in no order with one entry missing, and the log-probabilities that its tail makes of it."""
    log_p = (logits_of(B, T, V) if logits is None else logits).log_softmax(-1)
    values, columns = log_p.topk(k)
    shuffled = torch.randperm(k)
    values, columns = values[..., shuffled].clone(), columns[..., shuffled].clone()
    if k > 1 and logits is None:
        missing = values[0, 3].argmin()
        values[0, 3, missing], columns[0, 3, missing] = float("-inf"), -1
    dense = torch.full((B, T, V), float("-inf"))
    for b in range(B):
        for t in range(T):
            known = columns[b, t][columns[b, t] >= 0]
            if tail == "uniform":
                dense[b, t] = ((1 - log_p[b, t, known].exp().sum()) / (V - len(known))).log()
            dense[b, t, known] = log_p[b, t, known]
    return TeacherTopK(values, columns, tail), dense


FORMS = {
    "hidden": lambda: hidden_of()[0],
    "renormalize": lambda: top_k_of("renormalize", logits_of(B, T, V))[0],
    "uniform": lambda: top_k_of("uniform", logits_of(B, T, V))[0],
    "bucket": lambda: top_k_of("bucket", logits_of(B, T, V))[0],
}
