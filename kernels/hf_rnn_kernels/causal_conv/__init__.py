from hf_rnn_kernels.causal_conv.op import causal_conv

__all__ = ["causal_conv"]
