from mlot_kernels.ops.rank_truncate.op import gather_columns, rank_truncate

__all__ = ["gather_columns", "rank_truncate"]
