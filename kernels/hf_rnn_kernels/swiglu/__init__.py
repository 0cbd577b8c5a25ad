"""SwiGLU's elementwise part: torch's own, and for large inputs on a CPU one pass in each direction."""

import importlib

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.checks import refuse_forward_mode


def swiglu(x: Tensor) -> Tensor:
    """y = SiLU(gate) * up, where gate and up are the halves of the last dimension of x (Shazeer, arXiv 2002.05202).

    In float32 on a CPU one pass over x forward and one backward, whose gradient needs no concatenation of halves.

    Args:
        x: (..., 2 * D), any floating dtype.

    Returns:
        (..., D).

    Raises:
        ValueError: an odd last dimension.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension, gate and up, got {x.shape[-1]}")
    if threads.worthwhile(x):
        refuse_forward_mode(x)
        return _forward(x)
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _cpu():
    return importlib.import_module("hf_rnn_kernels.swiglu.cpu")


@torch.library.custom_op("hf_rnn::swiglu", mutates_args=(), device_types="cpu")
def _forward(x: Tensor) -> Tensor:
    return _cpu().forward(x)


@_forward.register_fake
def _(x):
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("hf_rnn::swiglu_backward", mutates_args=(), device_types="cpu")
def _backward(x: Tensor, grad: Tensor) -> Tensor:
    return _cpu().backward(x, grad)


@_backward.register_fake
def _(x, grad):
    return torch.empty(x.shape)


_forward.register_autograd(
    lambda ctx, grad: _backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
