from mlot_kernels.logits import Ranked
from mlot_kernels.ops.rank_truncate.op import gather_columns, rank_truncate

__all__ = ["Ranked", "gather_columns", "rank_truncate"]
