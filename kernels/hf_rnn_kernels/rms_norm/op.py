"""`hf_rnn::rms_norm`, of large inputs on a CPU."""

import torch
from torch import Tensor

from hf_rnn_kernels.operators import backend, operator


def _backward_shapes(x, weight, scale, grad):
    return torch.empty(x.shape), torch.empty(weight.shape)


@operator("rms_norm_backward", fake=_backward_shapes, device="cpu")
def backward(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    return backend(__package__, x).backward(x, weight, scale, grad)


def _shapes(x, weight, eps):
    return torch.empty(x.shape), torch.empty(x.shape[:-1])


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx, grad, _):
    return *backward(*ctx.saved_tensors, grad), None


@operator("rms_norm", fake=_shapes, backward=_backward, save=_save, device="cpu")
def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1 / sqrt(mean(x^2) + eps) of every row."""
    return backend(__package__, x).forward(x, weight, eps)
