"""The causal convolution in plain torch, for any dtype and device; what the compiled loops are tested against."""

import torch
from torch import Tensor

from hf_rnn_kernels.perturbed import Perturbed


def causal_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As K multiply-adds: a grouped conv1d and its two transposes take longer (docs/log.md, 2026-11-22)."""
    time, taps = x.shape[1], weight.shape[-1]
    padded = torch.cat([state.to(x.dtype), x], 1)
    # a copy: a view would keep the whole sequence alive
    last = padded[:, time:].to(torch.float64 if x.dtype == torch.float64 else torch.float32, copy=True)
    if time == 1 and not isinstance(weight, Perturbed):  # a step of decoding: few calls
        return (padded * weight.mT).sum(1, keepdim=True) + bias, last
    y = bias
    for j, column in enumerate(weight.unbind(-1)):
        y = torch.addcmul(y, padded[:, j : padded.shape[1] - taps + 1 + j], column)
    return y, last
