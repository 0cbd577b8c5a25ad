"""CPU backend of packed_linear: weights become numbers on their way into a register."""

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from hf_rnn_kernels.arrays import flat
from hf_rnn_kernels.matrix_product import LANES, product
from hf_rnn_kernels.packed_linear.reference import blocks
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import F32, U, parallel, row, sums

FEW = U(8)  # rows that are multiplied one by one; more go through `product`, which wants unpacked weights
TILE = U(64)  # rows of the matrix that are unpacked at once
_FOUR, _EIGHT = np.int32(4), np.int32(8)


_UNROLLED = {8: 4, 4: 1}  # vectors of bytes in one turn: what was fastest (docs/log.md, 2026-11-30)


def _vector_dot(bits):
    """A row of packed weights times x, as LLVM vectors, which it does not make of bytes well by itself.

    Sums of a group stay in lanes, and only their scaled sum over all groups is summed up in the end. Halves come as
    they are, 8 too large: sums begin with what that adds, `start` in each lane.
    """

    @intrinsic
    def dot(typing_context, w, w0, scale, s0, x, x0, start, groups, each):
        def generate(context, builder, signature, arguments):
            lane, float_ = ir.IntType(32), ir.FloatType()
            floats, wide, narrow = (ir.VectorType(kind, LANES) for kind in (float_, lane, ir.IntType(8)))
            w_at, scale_at, x_at, start_at = (
                context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 2, 4, 6)
            )
            _, w0, _, s0, _, x0, _, groups, each = arguments
            size, unrolled = each.type, _UNROLLED[bits]

            def load(data, index, kind):
                value = builder.load(builder.bitcast(builder.gep(data, [index]), kind.as_pointer()))
                value.align = 1 if kind is narrow else 4
                return value

            def spread(data, index):
                """One number in all lanes."""
                single = ir.Constant(floats, ir.Undefined)
                single = builder.insert_element(single, builder.load(builder.gep(data, [index])), lane(0))
                return builder.shuffle_vector(single, ir.Constant(floats, ir.Undefined), ir.Constant(wide, [0] * LANES))

            def add_product(sums, a, b):
                product = builder.fmul(a, b, flags=["contract"])
                builder.store(builder.fadd(builder.load(sums), product, flags=["contract"]), sums)

            def some(i, n):
                """The vector of bytes at i times what of x belongs to it."""
                byte = load(w_at, builder.add(w_here, i), narrow)
                if bits == 8:
                    number = builder.sitofp(builder.sext(byte, wide), floats)
                    add_product(sums[n], number, load(x_at, builder.add(x_here, i), floats))
                    return
                byte, first = builder.zext(byte, wide), builder.add(x_here, i)
                low = builder.and_(byte, ir.Constant(wide, [15] * LANES))
                high = builder.lshr(byte, ir.Constant(wide, [4] * LANES))
                add_product(sums[0], builder.sitofp(low, floats), load(x_at, first, floats))
                add_product(sums[1], builder.sitofp(high, floats), load(x_at, builder.add(first, bytes_each), floats))

            zero = ir.Constant(floats, [0.0] * LANES)
            total, *sums = (cgutils.alloca_once(builder, floats) for _ in range(1 + max(unrolled, 2)))
            builder.store(zero, total)
            bytes_each = each if bits == 8 else builder.udiv(each, size(2))
            with cgutils.for_range(builder, groups) as group:
                for n, each_sum in enumerate(sums):
                    begin = spread(start_at, group.index) if bits == 4 and n == 0 else zero
                    builder.store(begin, each_sum)
                w_here = builder.add(w0, builder.mul(group.index, bytes_each))
                x_here = builder.add(x0, builder.mul(group.index, each))
                step = size(LANES * unrolled)
                whole = builder.udiv(bytes_each, step)
                with cgutils.for_range(builder, whole) as turn:
                    for n in range(unrolled):
                        some(builder.add(builder.mul(turn.index, step), size(n * LANES)), n)
                done = builder.mul(whole, step)
                if unrolled > 1:
                    rest = builder.udiv(builder.sub(bytes_each, done), size(LANES))
                    with cgutils.for_range(builder, rest) as turn:
                        some(builder.add(done, builder.mul(turn.index, size(LANES))), 0)
                all_sums = builder.load(sums[0])
                for other in sums[1:]:
                    all_sums = builder.fadd(all_sums, builder.load(other))
                add_product(total, all_sums, spread(scale_at, builder.add(s0, group.index)))
            lanes, result = builder.load(total), float_(0.0)
            for n in range(LANES):
                result = builder.fadd(result, builder.extract_element(lanes, lane(n)))
            return result

        u64 = types.uint64
        return types.float32(w, u64, scale, u64, x, u64, start, u64, u64), generate

    return dot


_bytes_vectors, _halves_vectors = _vector_dot(8), _vector_dot(4)


@sums
def _bytes_dot(size, w, w0, x, x0):
    total = F32(0)
    for i in range(size):
        total += F32(np.int8(w[w0 + i])) * x[x0 + i]
    return total


@sums
def _halves_dot(half, w, w0, x, x0):
    """The first `half` of the numbers are the low halves of the bytes, the others the high ones."""
    total = F32(0)
    for i in range(half):
        byte = np.int32(w[w0 + i])
        total += F32((byte & np.int32(15)) - _EIGHT) * x[x0 + i] + F32((byte >> _FOUR) - _EIGHT) * x[x0 + half + i]
    return total


@row
def starts(bits, inputs, group, x, x0):
    """What sums of groups of halves begin with: -8 times the sum of their part of x, over the lanes."""
    start = np.zeros(inputs // group if bits == U(4) else U(0), np.float32)
    for g in range(U(start.size)):
        for i in range(group):
            start[g] += x[x0 + g * group + i]
        start[g] *= F32(-8 / LANES)
    return start


@row
def packed_dot(bits, inputs, group, w, scale, o, x, x0, start):
    """Row `o` of the matrix times x, of which `start` comes."""
    groups = inputs // group
    each = group * bits // U(8)
    w0, s0 = o * groups * each, o * groups
    if bits == U(8) and groups == U(1):  # the last few numbers of a row are no vector
        whole = each // U(LANES) * U(LANES)
        rest = _bytes_dot(each - whole, w, w0 + whole, x, x0 + whole)
        return _bytes_vectors(w, w0, scale, s0, x, x0, start, groups, whole) + scale[s0] * rest
    if each % U(LANES) == U(0):
        if bits == U(8):
            return _bytes_vectors(w, w0, scale, s0, x, x0, start, groups, group)
        return _halves_vectors(w, w0, scale, s0, x, x0, start, groups, group)
    total = F32(0)
    for g in range(groups):
        if bits == U(8):
            dot = _bytes_dot(group, w, w0 + g * each, x, x0 + g * group)
        else:
            dot = _halves_dot(each, w, w0 + g * each, x, x0 + g * group)
        total += scale[s0 + g] * dot
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
def panels_of(panels, rows, width, x, x0, apart):
    """x (rows, width) with rows in the lanes, as `product` wants its right side: (panels, width, LANES), or nothing."""
    y = np.zeros(panels * width * U(LANES), np.float32)
    for r in range(min(rows, panels * U(LANES))):
        at = (r // U(LANES)) * width * U(LANES) + r % U(LANES)
        for i in range(width):
            y[at + i * U(LANES)] = x[x0 + r * apart + i]
    return y


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
    for r in range(U(x.size) // inputs):
        start = starts(bits, inputs, group, x, r * inputs)
        for o in prange(outputs):
            y[r * outputs + U(o)] = packed_dot(bits, inputs, group, packed, scale, U(o), x, r * inputs, start)


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
    y = torch.empty(packed.shape[0], packed.shape[1] * 8 // bits, dtype=torch.float32, device="cpu")
    run(_unpack, _sizes(packed, scale, bits), packed.reshape(-1).numpy(), flat(scale), flat(y))
    return y.to(dtype)


def forward(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    y = torch.empty(x.shape[0], packed.shape[0], dtype=torch.float32, device="cpu")
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
