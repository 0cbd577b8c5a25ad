import torch
from torch import Tensor, nn

from hf_rnn_kernels import causal_conv
from hf_rnn_kernels.layout import SequenceLayout


class CausalConv(nn.Module):
    """Depthwise causal convolution over time: y_t = bias + sum_j weight[:, j] * x_{t - (K-1) + j}."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.state_shape = (kernel_size - 1, channels)
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor, state: Tensor | None, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the K - 1 inputs before each sequence (N, K - 1, D), or None for zeros, to y (B, T, D) and
        the state after the last real token."""
        return causal_conv(x, state, self.weight, self.bias, layout)
