"""`hf_rnn::causal_conv`, of large inputs on a CPU."""

import torch
from torch import Tensor

from hf_rnn_kernels.operators import backend, operator


def _backward_shapes(x, before, weight, grad, reverse=False):
    return torch.empty(x.shape), torch.empty(before.shape), torch.empty(weight.shape), torch.empty(x.shape[-1])


@operator("causal_conv_backward", fake=_backward_shapes, device="cpu")
def backward(
    x: Tensor, before: Tensor, weight: Tensor, grad: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, before, weight and bias."""
    return backend(__package__, x).backward(x, before, weight, grad, reverse)


def _shapes(x, before, weight, bias, reverse=False):
    return torch.empty(x.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.reverse = inputs[4]


def _backward(ctx, grad):
    return *backward(*ctx.saved_tensors, grad, ctx.reverse), None


@operator("causal_conv", fake=_shapes, backward=_backward, save=_save, device="cpu")
def forward(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """y of `reference.convolve`; `before` (B, K - 1, D) in the dtype of x."""
    return backend(__package__, x).forward(x, before, weight, bias, reverse)
