from mlot_kernels.ops.topk_softmax.op import TopK, topk_softmax

__all__ = ["TopK", "topk_softmax"]
