"""Depthwise causal convolution over time: K multiply-adds, and for large inputs on a CPU one pass in each direction."""

import importlib

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.causal_conv import reference
from hf_rnn_kernels.checks import refuse_forward_mode
from hf_rnn_kernels.perturbed import Perturbed


def causal_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[:, j] * x_{t - (K - 1) + j}, each channel for itself.

    Args:
        x: (B, T, D), any floating dtype.
        state: (B, K - 1, D), the inputs before x; zeros where there are none.
        weight: (D, K).
        bias: (D,).

    Returns:
        y like x, and the state after x, in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit x.
    """
    batch, time, channels = x.shape
    history = weight.shape[-1] - 1
    shapes = (batch, history, channels), (channels, history + 1), (channels,)
    if (state.shape, weight.shape, bias.shape) != shapes:
        name, given, shape = next(
            (name, given.shape, shape)
            for name, given, shape in zip(("state", "weight", "bias"), (state, weight, bias), shapes, strict=True)
            if given.shape != shape
        )
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(given)}")
    perturbed = isinstance(weight, Perturbed) or isinstance(bias, Perturbed)
    if perturbed or not (threads.worthwhile(x) and weight.dtype == bias.dtype == torch.float32):
        return reference.causal_conv(x, state, weight, bias)
    refuse_forward_mode(x, state, weight, bias)
    before = state.to(x.dtype)
    ends = torch.cat([before, x[:, max(time - history, 0) :]], 1)
    last = ends[:, ends.shape[1] - history :].clone(memory_format=torch.contiguous_format)
    return _forward(x, before, weight, bias), last


def _cpu():
    return importlib.import_module("hf_rnn_kernels.causal_conv.cpu")


@torch.library.custom_op("hf_rnn::causal_conv", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _cpu().forward(x, before, weight, bias)


@_forward.register_fake
def _(x, before, weight, bias):
    return torch.empty(x.shape)


@torch.library.custom_op("hf_rnn::causal_conv_backward", mutates_args=(), device_types="cpu")
def _backward(x: Tensor, before: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, before, weight and bias."""
    return _cpu().backward(x, before, weight, grad)


@_backward.register_fake
def _(x, before, weight, grad):
    return torch.empty(x.shape), torch.empty(before.shape), torch.empty(weight.shape), torch.empty(x.shape[-1])


_forward.register_autograd(
    lambda ctx, grad: _backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
)
