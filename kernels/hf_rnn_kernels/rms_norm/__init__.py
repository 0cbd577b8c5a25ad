"""RMS normalisation: torch's own, and for large inputs on a CPU one pass in each direction."""

import importlib

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.checks import refuse_forward_mode
from hf_rnn_kernels.perturbed import Perturbed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    torch's `rms_norm` on a CPU is a chain of elementwise passes: in float32 this is used instead, which takes a quarter
    of the time (`python benchmarks/layers.py`).

    Args:
        x: (..., D), any floating dtype.
        weight: (D,).
        eps: added to the mean square.

    Returns:
        Like x.

    Raises:
        ValueError: weight does not fit x.
    """
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"weight: expected the last dimension of x, {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if isinstance(weight, Perturbed):
        return rms_norm(x, torch.ones_like(weight.base()), eps) * weight.over(x)
    if threads.worthwhile(x) and weight.dtype == torch.float32:
        refuse_forward_mode(x, weight)
        return _forward(x, weight, eps)[0]
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def _cpu():
    return importlib.import_module("hf_rnn_kernels.rms_norm.cpu")


@torch.library.custom_op("hf_rnn::rms_norm", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and 1 / sqrt(mean(x^2) + eps) of every row."""
    return _cpu().forward(x, weight, eps)


@_forward.register_fake
def _(x, weight, eps):
    return torch.empty(x.shape), torch.empty(x.shape[:-1])


@torch.library.custom_op("hf_rnn::rms_norm_backward", mutates_args=(), device_types="cpu")
def _backward(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    return _cpu().backward(x, weight, scale, grad)


@_backward.register_fake
def _(x, weight, scale, grad):
    return torch.empty(x.shape), torch.empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


_forward.register_autograd(
    lambda ctx, grad, _: (*_backward(*ctx.saved_tensors, grad), None), setup_context=_setup_context
)
