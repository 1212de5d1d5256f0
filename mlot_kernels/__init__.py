"""Fused ranking and optimal-transport operators for distillation losses."""

from mlot_kernels.backends import BackendUnavailable, explain, use_backend
from mlot_kernels.logits import Logits
from mlot_kernels.losses import (
    MultiLevelOTLoss,
    OfficialMultiLevelOTLoss,
    multi_level_ot_loss,
    official_multi_level_ot_loss,
)
from mlot_kernels.ops.pairwise_cost import pairwise_cost
from mlot_kernels.ops.rank_truncate import Ranked, gather_columns, rank_truncate
from mlot_kernels.ops.row_entropy import row_entropy
from mlot_kernels.ops.sinkhorn import Transport, sinkhorn
from mlot_kernels.rows import Pairing, Rows, pair

__all__ = [
    "BackendUnavailable",
    "Logits",
    "MultiLevelOTLoss",
    "OfficialMultiLevelOTLoss",
    "Pairing",
    "Ranked",
    "Rows",
    "Transport",
    "explain",
    "gather_columns",
    "multi_level_ot_loss",
    "official_multi_level_ot_loss",
    "pair",
    "pairwise_cost",
    "rank_truncate",
    "row_entropy",
    "sinkhorn",
    "use_backend",
]
