"""`hf_rnn::silu_gate`, of large inputs on a CPU."""

import torch
from torch import Tensor

from hf_rnn_kernels.operators import backend, operator


def _backward_shapes(h, gate, grad):
    return torch.empty(h.shape), torch.empty(gate.shape)


@operator("silu_gate_backward", fake=_backward_shapes, device="cpu")
def backward(h: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of h and gate."""
    return backend(__package__, h).backward(h, gate, grad)


def _shapes(h, gate):
    return torch.empty(h.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return backward(*ctx.saved_tensors, grad)


@operator("silu_gate", fake=_shapes, backward=_backward, save=_save, device="cpu")
def forward(h: Tensor, gate: Tensor) -> Tensor:
    """See `reference.silu_gate`."""
    return backend(__package__, h).forward(h, gate)
