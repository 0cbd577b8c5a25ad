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
from hf_rnn_kernels.vector_math import F32, ROUND, U, as_float, as_int, ask_for, parallel, row, sums

FEW = U(8)  # rows that are multiplied one by one; more go through `product`, which wants unpacked weights
TILE = U(64)  # rows of the matrix that are unpacked at once
_FOUR, _EIGHT = np.int32(4), np.int32(8)
BLOCK = U(256)  # numbers of x that share a scale where the weights' own groups are whole rows
_WORDS = 2 * LANES  # of 16 bits in a vector
_AHEAD = 4096  # bytes that are asked for ahead; the processor by itself asks for fewer (docs/log.md, 2026-12-01)
_LARGEST = U(4000)  # numbers whose products of 8 and 16 bits, summed in 8 lanes of 32 bits, cannot overflow
_MOST = F32(32767)
_INFINITY, _TINY = np.int32(0x7F800000), np.int32(0x07000000)  # as bits; 9.6e-35, whose inverse times `_MOST` is finite


def _vector_dot(bits, rest):
    """A row of packed weights times x, both whole numbers, as LLVM vectors.

    Bytes become words of 16 bits, which times those of x are added in pairs: one instruction on x86, which LLVM finds.
    Sums of a block stay in lanes of 32 bits, become floats with the block's scales, and only their sum over all blocks
    is summed up in the end. Halves come as they are, 8 too large: sums begin with what that adds, `start`.
    `rest`: whether a block may have more than whole vectors, which short blocks of halves had better not be asked.
    """

    @intrinsic
    def dot(typing_context, w, w0, scale, s0, s_step, x, x_scale, start, inputs, each):
        def generate(context, builder, signature, arguments):
            lane, float_ = ir.IntType(32), ir.FloatType()
            floats, lanes = (ir.VectorType(kind, LANES) for kind in (float_, lane))
            wide, words, narrow = (ir.VectorType(ir.IntType(n), _WORDS) for n in (32, 16, 8))
            w_at, scale_at, x_at, x_scale_at, start_at = (
                context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 2, 5, 6, 7)
            )
            _, w0, _, s0, s_step, _, _, _, inputs, each = arguments
            size, packing = each.type, each.type(8 // bits)

            def number(data, index):
                return builder.load(builder.gep(data, [index]))

            def load(data, index, kind):
                value = builder.load(builder.bitcast(builder.gep(data, [index]), kind.as_pointer()))
                value.align = 1 if kind is narrow else 2
                return value

            def pick(vector, *places):
                mask = ir.Constant(ir.VectorType(lane, len(places)), places)
                return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)

            def add_products(a, index):
                """To the sums, those of words with x from an index on, in pairs of neighbours."""
                a, b = (builder.sext(words, wide) for words in (a, load(x_at, index, words)))
                product = builder.mul(a, b, flags=["nsw"])
                pairs = builder.add(pick(product, *range(0, _WORDS, 2)), pick(product, *range(1, _WORDS, 2)))
                builder.store(builder.add(builder.load(sums), pairs), sums)

            def add_product(a, index):
                """To the first lane, that of one number."""
                now, b = builder.load(sums), builder.sext(number(x_at, index), lane)
                first = builder.add(builder.extract_element(now, lane(0)), builder.mul(a, b, flags=["nsw"]))
                builder.store(builder.insert_element(now, first, lane(0)), sums)

            total, sums = cgutils.alloca_once(builder, floats), cgutils.alloca_once(builder, lanes)
            builder.store(ir.Constant(floats, [0.0] * LANES), total)
            blocks = builder.udiv(builder.add(inputs, builder.sub(each, size(1))), each)
            with cgutils.for_range(builder, blocks) as block:
                begin = ir.Constant(lanes, [0] * LANES)
                if bits == 4:
                    begin = builder.insert_element(begin, number(start_at, block.index), lane(0))
                builder.store(begin, sums)
                x_here = builder.mul(block.index, each)
                w_here = builder.add(w0, builder.udiv(x_here, packing))
                here = builder.udiv(each, packing)
                if bits == 8:  # the last block may be smaller
                    left = builder.sub(inputs, x_here)
                    here = builder.select(builder.icmp_unsigned("<", left, each), left, each)
                turns = builder.udiv(here, size(_WORDS))

                def turn(i, x_here=x_here, w_here=w_here, here=here):
                    at, first = builder.add(w_here, i), builder.add(x_here, i)
                    ask_for(builder, builder.gep(w_at, [builder.add(at, size(_AHEAD))]))
                    byte = load(w_at, at, narrow)
                    if bits == 8:
                        add_products(builder.sext(byte, words), first)
                    else:
                        byte = builder.zext(byte, words)
                        add_products(builder.and_(byte, ir.Constant(words, [15] * _WORDS)), first)
                        add_products(builder.lshr(byte, ir.Constant(words, [4] * _WORDS)), builder.add(first, here))

                def one(i, x_here=x_here, w_here=w_here, here=here):
                    """What is no vector, a byte at a time."""
                    byte, first = number(w_at, builder.add(w_here, i)), builder.add(x_here, i)
                    if bits == 8:
                        add_product(builder.sext(byte, lane), first)
                    else:
                        byte = builder.zext(byte, lane)
                        add_product(builder.and_(byte, lane(15)), first)
                        add_product(builder.lshr(byte, lane(4)), builder.add(first, here))

                # Most groups of halves are one vector, for which a loop would cost more than what it does.
                done = int(bits == 4 and not rest)
                if done:
                    turn(size(0))
                with cgutils.for_range(builder, turns, start=size(done)) as each_turn:
                    turn(builder.mul(each_turn.index, size(_WORDS)))
                if rest:
                    with cgutils.for_range(builder, here, start=builder.mul(turns, size(_WORDS))) as left_over:
                        one(left_over.index)
                scale_here = number(scale_at, builder.add(s0, builder.mul(block.index, s_step)))
                both = builder.fmul(scale_here, number(x_scale_at, block.index))
                both = pick(builder.insert_element(ir.Constant(floats, ir.Undefined), both, lane(0)), *[0] * LANES)
                product = builder.fmul(builder.sitofp(builder.load(sums), floats), both, flags=["contract"])
                builder.store(builder.fadd(builder.load(total), product, flags=["contract"]), total)
            result, half = builder.load(total), LANES // 2
            while half:
                result = builder.fadd(pick(result, *range(half)), pick(result, *range(half, 2 * half)))
                half //= 2
            return builder.extract_element(result, lane(0))

        u64 = types.uint64
        return types.float32(w, u64, scale, u64, u64, x, x_scale, start, u64, u64), generate

    return dot


_bytes, _halves, _halves_and_rest = _vector_dot(8, True), _vector_dot(4, False), _vector_dot(4, True)


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
def _block(bits, inputs, group):
    """How many numbers of x share a scale, and whether they are rounded."""
    each = BLOCK if bits == U(8) and group == inputs else group
    return each, each <= _LARGEST


@row
def rounded(bits, inputs, group, x, x0):
    """x rounded to 16 bits, (inputs,) int16, its scale in each block, and what a block's sum of halves begins with.

    A block with a NaN or an infinity has NaN for a scale; one below 1e-34 is zero. Nothing for groups that are too
    large.
    """
    each, fits = _block(bits, inputs, group)
    inputs = inputs if fits else U(0)
    blocks = (inputs + each - U(1)) // each
    q, scale, start = np.zeros(inputs, np.int16), np.empty(blocks, np.float32), np.zeros(blocks, np.int32)
    for b in range(blocks):
        begin, end = b * each, min((b + U(1)) * each, inputs)
        most = np.int32(0)
        for i in range(begin, end):  # as whole numbers, whose largest is found in vectors
            most = max(most, np.int32(as_int(x[x0 + i]) & np.int32(0x7FFFFFFF)))
        largest = as_float(most)
        scale[b] = F32(np.nan) if most >= _INFINITY else largest / _MOST
        if most >= _INFINITY or most < _TINY:
            continue
        times, total = _MOST / largest, np.int32(0)
        for i in range(begin, end):
            n = np.int16(as_int(x[x0 + i] * times + ROUND))
            q[i] = n
            total += np.int32(n)
        if bits == U(4):
            start[b] = np.int32(-8) * total
    return q, scale, start


@row
def packed_dots(bits, inputs, group, w, scale, o, end, x, x0, q, x_scale, start, y, y0):
    """y += rows `o` to `end` of the matrix times x, of which `q`, `x_scale` and `start` come.

    Groups that are too large stay float32. The rows are inside: a call for each took as long as its products.
    """
    each, fits = _block(bits, inputs, group)
    groups, bytes_ = inputs // group, inputs * bits // U(8)
    step = U(groups > U(1))
    while o < end:
        w0, s0, total = o * bytes_, o * groups, F32(0)
        if fits and bits == U(4) and group % U(2 * _WORDS) == U(0):
            total = _halves(w, w0, scale, s0, step, q, x_scale, start, inputs, each)
        elif fits and bits == U(4):
            total = _halves_and_rest(w, w0, scale, s0, step, q, x_scale, start, inputs, each)
        elif fits:
            total = _bytes(w, w0, scale, s0, step, q, x_scale, start, inputs, each)
        else:
            for g in range(groups):
                at, to = w0 + g * group * bits // U(8), x0 + g * group
                if bits == U(8):
                    total += scale[s0 + g] * _bytes_dot(group, w, at, x, to)
                else:
                    total += scale[s0 + g] * _halves_dot(group // U(2), w, at, x, to)
        y[y0 + o] += total
        o += U(1)


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
    """y (N, O), of few rows, added to."""
    bits, outputs, inputs, group = sizes
    for r in range(U(x.size) // inputs):
        q, x_scale, start = rounded(bits, inputs, group, x, r * inputs)
        for part in prange((outputs + TILE - U(1)) // TILE):
            o = U(part) * TILE
            end = min(o + TILE, outputs)
            packed_dots(bits, inputs, group, packed, scale, o, end, x, r * inputs, q, x_scale, start, y, r * outputs)


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
    y = torch.zeros(x.shape[0], packed.shape[0], dtype=torch.float32, device="cpu")
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
