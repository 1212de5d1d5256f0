from mlot_kernels.ops.sinkhorn.op import Transport, sinkhorn

__all__ = ["Transport", "sinkhorn"]
