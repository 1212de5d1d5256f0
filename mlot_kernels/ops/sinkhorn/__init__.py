from mlot_kernels.ops.sinkhorn.op import sinkhorn

__all__ = ["sinkhorn"]
