from mlot_kernels.ops.rank_truncate.op import Ranked, gather_columns, rank_truncate

__all__ = ["Ranked", "gather_columns", "rank_truncate"]
