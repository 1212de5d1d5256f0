from mlot_kernels.ops.row_divergence.op import row_divergence

__all__ = ["row_divergence"]
