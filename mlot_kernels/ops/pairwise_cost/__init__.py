from mlot_kernels.ops.pairwise_cost.op import pairwise_cost

__all__ = ["pairwise_cost"]
