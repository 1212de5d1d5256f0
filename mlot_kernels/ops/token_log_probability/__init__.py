from mlot_kernels.ops.token_log_probability.op import token_log_probability

__all__ = ["token_log_probability"]
