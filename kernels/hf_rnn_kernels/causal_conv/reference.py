"""The causal convolution in plain torch, for any dtype and device; what the compiled loops are tested against."""

import torch
from torch import Tensor

from hf_rnn_kernels.perturbed import Perturbed


def convolve(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """y (B, T, D) of x behind the K - 1 inputs before it, and the last K - 1 of all these inputs, as they are read:
    with `reverse` from the last one to the first.

    As K multiply-adds: a grouped conv1d and its two transposes take longer (docs/log.md, 2026-11-22).
    """
    time, history = x.shape[1], weight.shape[-1] - 1
    if time == 1 and not isinstance(weight, Perturbed):  # a step of decoding: few calls
        padded = torch.cat([before, x], 1)
        return (padded * weight.mT).sum(1, keepdim=True) + bias, padded[:, 1:]
    padded = torch.cat([x, before.flip(1)] if reverse else [before, x], 1)
    y = bias
    for j, column in enumerate(weight.unbind(-1)):
        first = history - j if reverse else j
        y = torch.addcmul(y, padded[:, first : first + time], column)
    return y, padded[:, :history].flip(1) if reverse else padded[:, time:]
