"""The mLSTM's output: each head normalised, then an output gate. torch's own, and fused for large inputs on a CPU."""

import importlib

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.checks import refuse_forward_mode
from hf_rnn_kernels.perturbed import Perturbed


def gated_norm(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = sigmoid(gate) * weight * (h - mean(h)) / sqrt(var(h) + eps), mean and variance of each head (xLSTM-7B).

    In float32 on a CPU one pass forward and one backward, which computes sigmoid and norm again.

    Args:
        h: (..., H, P), any floating dtype. gate: (..., H * P). weight: (H * P,).
        eps: added to the variance.

    Returns:
        (..., H * P).

    Raises:
        ValueError: shapes that do not fit.
    """
    if gate.shape != (*h.shape[:-2], h.shape[-2] * h.shape[-1]):
        raise ValueError(
            f"gate: expected h with its heads joined, {tuple(h.flatten(-2).shape)}, got {tuple(gate.shape)}"
        )
    if weight.shape != gate.shape[-1:]:
        raise ValueError(f"weight: expected shape {tuple(gate.shape[-1:])}, got {tuple(weight.shape)}")
    if isinstance(weight, Perturbed):
        return gated_norm(h, gate, torch.ones_like(weight.base()), eps) * weight.over(gate)
    if threads.worthwhile(h) and gate.dtype == weight.dtype == torch.float32:
        refuse_forward_mode(h, gate, weight)
        return _forward(h, gate, weight, eps)
    return torch.sigmoid(gate) * (torch.nn.functional.layer_norm(h, h.shape[-1:], eps=eps).flatten(-2) * weight)


def _cpu():
    return importlib.import_module("hf_rnn_kernels.gated_norm.cpu")


@torch.library.custom_op("hf_rnn::gated_norm", mutates_args=(), device_types="cpu")
def _forward(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _cpu().forward(h, gate, weight, eps)


@_forward.register_fake
def _(h, gate, weight, eps):
    return torch.empty(gate.shape)


@torch.library.custom_op("hf_rnn::gated_norm_backward", mutates_args=(), device_types="cpu")
def _backward(h: Tensor, gate: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, gate and weight."""
    return _cpu().backward(h, gate, weight, eps, grad)


@_backward.register_fake
def _(h, gate, weight, eps, grad):
    return torch.empty(h.shape), torch.empty(gate.shape), torch.empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


_forward.register_autograd(
    lambda ctx, grad: (*_backward(*ctx.saved_tensors, ctx.eps, grad), None), setup_context=_setup_context
)
