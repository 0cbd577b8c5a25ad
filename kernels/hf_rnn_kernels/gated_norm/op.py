"""`hf_rnn::gated_norm`, of large inputs on a CPU."""

import torch
from torch import Tensor

from hf_rnn_kernels.operators import backend, operator


def _backward_shapes(h, gate, weight, eps, grad):
    return torch.empty(h.shape), torch.empty(gate.shape), torch.empty(weight.shape)


@operator("gated_norm_backward", fake=_backward_shapes, device="cpu")
def backward(h: Tensor, gate: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, gate and weight."""
    return backend(__package__, h).backward(h, gate, weight, eps, grad)


def _shapes(h, gate, weight, eps):
    return torch.empty(gate.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *backward(*ctx.saved_tensors, ctx.eps, grad), None


@operator("gated_norm", fake=_shapes, backward=_backward, save=_save, device="cpu")
def forward(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.gated_norm`."""
    return backend(__package__, h).forward(h, gate, weight, eps)
