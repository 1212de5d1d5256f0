from mlot_kernels.ops.sorted_l1.op import sorted_l1

__all__ = ["sorted_l1"]
