from mlot_kernels.ops.match_columns.op import match_columns

__all__ = ["match_columns"]
