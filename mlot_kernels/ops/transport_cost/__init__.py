from mlot_kernels.ops.transport_cost.op import transport_cost

__all__ = ["transport_cost"]
