"""The causal convolution in plain torch, for any dtype and device; what the compiled loops are tested against."""

import torch
from torch import Tensor

from hf_rnn_kernels.perturbed import Perturbed


def convolve(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """y (B, T, D) of x behind the K - 1 inputs before it, and the last K - 1 of all these inputs, as they are read:
    with `reverse` from the last one to the first.

    As K multiply-adds: a grouped conv1d and its two transposes take longer (docs/log.md, 2026-11-22).
    """
    if reverse:
        y, ends = convolve(x.flip(1), before, weight, bias)
        return y.flip(1), ends
    time, taps = x.shape[1], weight.shape[-1]
    padded = torch.cat([before, x], 1)
    if time == 1 and not isinstance(weight, Perturbed):  # a step of decoding: few calls
        return (padded * weight.mT).sum(1, keepdim=True) + bias, padded[:, 1:]
    y = bias
    for j, column in enumerate(weight.unbind(-1)):
        y = torch.addcmul(y, padded[:, j : padded.shape[1] - taps + 1 + j], column)
    return y, padded[:, time:]
