"""A block of rows unpacked at a time, in plain torch, for any dtype and device."""

import torch
from torch import Tensor

from hf_rnn_kernels.packed_linear.packing import unpack

BLOCK = 1 << 20  # weights that are unpacked at once: 4 MiB, which later caches hold


def blocks(packed: Tensor, bits: int) -> list[slice]:
    """Rows that are unpacked together."""
    rows = max(1, BLOCK * bits // 8 // max(packed.shape[1], 1))
    return [slice(start, start + rows) for start in range(0, packed.shape[0], rows)]


def forward(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    parts = [x @ unpack(packed[at], scale[at], bits).to(x.dtype).t() for at in blocks(packed, bits)]
    return torch.cat(parts, 1) if parts else x.new_empty(x.shape[0], 0)


def backward(grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    grad_x = grad.new_zeros(grad.shape[0], packed.shape[1] * 8 // bits)
    for at in blocks(packed, bits):
        grad_x += grad[:, at] @ unpack(packed[at], scale[at], bits).to(grad.dtype)
    return grad_x
