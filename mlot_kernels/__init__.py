"""Fused ranking and optimal-transport operators for distillation losses."""

from mlot_kernels.alignment import Alignment, align_byte_offsets, byte_offsets
from mlot_kernels.backends import BackendUnavailable, explain, use_backend
from mlot_kernels.logits import Logits, Ranked
from mlot_kernels.losses import (
    DivergenceLoss,
    HybridLoss,
    MultiLevelOTLoss,
    OfficialMultiLevelOTLoss,
    RankingLoss,
    SequenceTransportLoss,
    ULDLoss,
    divergence_loss,
    hybrid_loss,
    multi_level_ot_loss,
    official_multi_level_ot_loss,
    ranking_loss,
    sequence_transport_loss,
    uld_loss,
)
from mlot_kernels.merging import MergedRows, merge_groups
from mlot_kernels.ops.match_columns import match_columns
from mlot_kernels.ops.pairwise_cost import pairwise_cost
from mlot_kernels.ops.rank_truncate import gather_columns, rank_truncate
from mlot_kernels.ops.row_divergence import row_divergence
from mlot_kernels.ops.row_entropy import row_entropy
from mlot_kernels.ops.sinkhorn import sinkhorn
from mlot_kernels.ops.soft_rank import soft_rank
from mlot_kernels.ops.sorted_l1 import sorted_l1
from mlot_kernels.ops.token_log_probability import token_log_probability
from mlot_kernels.ops.topk_softmax import TopK, topk_softmax
from mlot_kernels.ops.transport_cost import transport_cost
from mlot_kernels.rows import Pairing, Rows, pair
from mlot_kernels.teachers import TeacherHidden, TeacherTopK
from mlot_kernels.transport import Transport
from mlot_kernels.vocabularies import shared_tokens

__all__ = [
    "Alignment",
    "BackendUnavailable",
    "DivergenceLoss",
    "HybridLoss",
    "Logits",
    "MergedRows",
    "MultiLevelOTLoss",
    "OfficialMultiLevelOTLoss",
    "Pairing",
    "Ranked",
    "RankingLoss",
    "Rows",
    "SequenceTransportLoss",
    "TeacherHidden",
    "TeacherTopK",
    "TopK",
    "Transport",
    "ULDLoss",
    "align_byte_offsets",
    "byte_offsets",
    "divergence_loss",
    "explain",
    "gather_columns",
    "hybrid_loss",
    "match_columns",
    "merge_groups",
    "multi_level_ot_loss",
    "official_multi_level_ot_loss",
    "pair",
    "pairwise_cost",
    "rank_truncate",
    "ranking_loss",
    "row_divergence",
    "row_entropy",
    "sequence_transport_loss",
    "shared_tokens",
    "sinkhorn",
    "soft_rank",
    "sorted_l1",
    "token_log_probability",
    "topk_softmax",
    "transport_cost",
    "uld_loss",
    "use_backend",
]
