from mlot_kernels.ops.soft_rank.op import soft_rank

__all__ = ["soft_rank"]
