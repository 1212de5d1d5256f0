"""Losses: compositions of operators, as functions and as modules."""

from mlot_kernels.losses.divergence import DivergenceLoss, divergence_loss
from mlot_kernels.losses.hybrid import HybridLoss, hybrid_loss
from mlot_kernels.losses.multi_level_ot import MultiLevelOTLoss, multi_level_ot_loss
from mlot_kernels.losses.official_multi_level_ot import OfficialMultiLevelOTLoss, official_multi_level_ot_loss
from mlot_kernels.losses.ranking import RankingLoss, ranking_loss
from mlot_kernels.losses.sequence_transport import SequenceTransportLoss, sequence_transport_loss
from mlot_kernels.losses.uld import ULDLoss, uld_loss

__all__ = [
    "DivergenceLoss",
    "HybridLoss",
    "MultiLevelOTLoss",
    "OfficialMultiLevelOTLoss",
    "RankingLoss",
    "SequenceTransportLoss",
    "ULDLoss",
    "divergence_loss",
    "hybrid_loss",
    "multi_level_ot_loss",
    "official_multi_level_ot_loss",
    "ranking_loss",
    "sequence_transport_loss",
    "uld_loss",
]
