"""`hf_rnn::swiglu`, of large inputs on a CPU."""

import torch
from torch import Tensor

from hf_rnn_kernels.operators import backend, operator


def _backward_shapes(x, grad):
    return torch.empty(x.shape)


@operator("swiglu_backward", fake=_backward_shapes, device="cpu")
def backward(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x."""
    return backend(__package__, x).backward(x, grad)


def _shapes(x):
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return backward(*ctx.saved_tensors, grad)


@operator("swiglu", fake=_shapes, backward=_backward, save=_save, device="cpu")
def forward(x: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    return backend(__package__, x).forward(x)
