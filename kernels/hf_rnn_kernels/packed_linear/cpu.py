"""CPU backend of packed_linear: weights become numbers on their way into a register."""

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from hf_rnn_kernels.arrays import flat
from hf_rnn_kernels.matrix_product import LANES, product
from hf_rnn_kernels.packed_linear.reference import blocks
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import F32, FAST, U, parallel, row

_sums = njit(fastmath=FAST | {"reassoc"}, error_model="numpy")  # sums in any order, so that they vectorise
FEW = U(4)  # rows that are multiplied one by one; more go through `product`, which wants unpacked weights
TILE = U(64)  # rows of the matrix that are unpacked at once
_FOUR, _EIGHT = np.int32(4), np.int32(8)


@_sums
def _bytes_dot(size, w, w0, x, x0):
    total = F32(0)
    for i in range(size):
        total += F32(np.int8(w[w0 + i])) * x[x0 + i]
    return total


@_sums
def _halves_dot(half, w, w0, x, x0):
    """The first `half` of the numbers are the low halves of the bytes, the others the high ones."""
    total = F32(0)
    for i in range(half):
        byte = np.int32(w[w0 + i])
        total += F32((byte & np.int32(15)) - _EIGHT) * x[x0 + i] + F32((byte >> _FOUR) - _EIGHT) * x[x0 + half + i]
    return total


@row
def packed_dot(bits, inputs, group, w, scale, o, x, x0):
    """Row `o` of the matrix times x."""
    total, groups, each = F32(0), inputs // group, group * bits // U(8)
    for g in range(groups):
        at = (o * groups + g) * each
        if bits == U(8):
            dot = _bytes_dot(group, w, at, x, x0 + g * group)
        else:
            dot = _halves_dot(group // U(2), w, at, x, x0 + g * group)
        total += scale[o * groups + g] * dot
    return total


@row
def unpack_row(bits, inputs, group, w, scale, o, y, y0):
    """Row `o` of the matrix in float32."""
    groups, half, each = inputs // group, group // U(2), group * bits // U(8)
    for g in range(groups):
        at, to, s = (o * groups + g) * each, y0 + g * group, scale[o * groups + g]
        if bits == U(8):
            for i in range(group):
                y[to + i] = s * F32(np.int8(w[at + i]))
        else:
            for i in range(half):
                y[to + i] = s * F32((np.int32(w[at + i]) & np.int32(15)) - _EIGHT)
            for i in range(half):
                y[to + half + i] = s * F32((np.int32(w[at + i]) >> _FOUR) - _EIGHT)


@row
def panels_of(rows, width, x, x0, apart):
    """x (rows, width) with rows in the lanes, as `product` wants its right side: (panels, width, LANES)."""
    panels = (rows + U(LANES - 1)) // U(LANES)
    y = np.zeros(panels * width * U(LANES), np.float32)
    for r in range(rows):
        at = (r // U(LANES)) * width * U(LANES) + r % U(LANES)
        for i in range(width):
            y[at + i * U(LANES)] = x[x0 + r * apart + i]
    return y, panels


@row
def times_panels(w, w0, count, inputs, laid, panels, block):
    """block (count, panels * LANES) = rows of the matrix from w0 on times what `panels_of` laid out."""
    wide = panels * U(LANES)
    for n in range(count * wide):
        block[n] = F32(0)
    product(
        w, (w0, inputs, U(1)), laid, (U(0), inputs * U(LANES), U(LANES)), block, (U(0), wide), block, (U(0), wide),
        count, inputs, panels,
    )  # fmt: skip


@parallel
def _dots(sizes, packed, scale, x, y):
    """y (N, O), of few rows."""
    bits, outputs, inputs, group = sizes
    rows = U(x.size) // inputs
    for o in prange(outputs):
        for r in range(rows):
            y[r * outputs + U(o)] = packed_dot(bits, inputs, group, packed, scale, U(o), x, r * inputs)


@parallel
def _unpack(sizes, packed, scale, y):
    """(O, I) in float32."""
    bits, outputs, inputs, group = sizes
    for o in prange(outputs):
        unpack_row(bits, inputs, group, packed, scale, U(o), y, U(o) * inputs)


def _sizes(packed: Tensor, scale: Tensor, bits: int) -> tuple[U, U, U, U]:
    inputs = packed.shape[1] * 8 // bits
    return U(bits), U(packed.shape[0]), U(inputs), U(inputs // scale.shape[1])


def _unpacked(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(packed.shape[0], packed.shape[1] * 8 // bits)
    run(_unpack, _sizes(packed, scale, bits), packed.reshape(-1).numpy(), flat(scale), flat(y))
    return y.to(dtype)


def forward(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    y = torch.empty(x.shape[0], packed.shape[0])
    if x.shape[0] <= FEW:
        run(_dots, _sizes(packed, scale, bits), packed.reshape(-1).numpy(), flat(scale), flat(x), flat(y))
        return y.to(x.dtype)
    y = y.to(x.dtype)
    for at in blocks(packed, bits):
        torch.mm(x, _unpacked(packed[at], scale[at], bits, x.dtype).t(), out=y[:, at])
    return y


def backward(grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    grad_x = grad.new_zeros(grad.shape[0], packed.shape[1] * 8 // bits)
    for at in blocks(packed, bits):
        grad_x.addmm_(grad[:, at], _unpacked(packed[at], scale[at], bits, grad.dtype))
    return grad_x
