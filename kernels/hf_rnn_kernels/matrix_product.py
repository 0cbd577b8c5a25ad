"""Small matrix products inside numba's loops: init + A B with B packed once, at the speed of a BLAS without its calls.

A step of a recurrence multiplies a few rows by a matrix that stays in cache, thousands of times, so that the cost of a
call and of packing would count. The innermost tile is emitted as LLVM vectors, whose accumulators stay in registers.
"""

import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from hf_rnn_kernels.vector_math import U, row

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
_ROWS, _PANELS = 4, 4 if LANES == 16 else 2  # a tile: 16 of AVX-512's 32 registers accumulate, or 8 of AVX2's 16

_NAMES = ["a", "a0", "a_row", "a_step", "b", "b0", "b_panel", "b_step"]
_NAMES += ["init", "i0", "i_row", "out", "o0", "o_row", "depth"]


def pack(matrix: Tensor) -> Tensor:
    """(H, K, N) to (H, panels, K, LANES) with N padded by zeros: each panel is read from end to end."""
    heads, depth, width = matrix.shape
    panels = -(-width // LANES)
    padded = torch.nn.functional.pad(matrix, (0, panels * LANES - width))
    return padded.view(heads, depth, panels, LANES).transpose(1, 2).contiguous()


def _tile(rows: int, panels: int):
    """out[r, p] = init[r, p] + sum_k a[r, k] b[p, k] for vectors of LANES; flat arrays with offsets and strides."""

    @intrinsic
    def tile(typing_context, a, a0, a_row, a_step, b, b0, b_panel, b_step, init, i0, i_row, out, o0, o_row, depth):
        def generate(context, builder, signature, arguments):
            vector, lane = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32)
            values = dict(zip(_NAMES, arguments, strict=True))
            data = {
                name: context.make_array(array)(context, builder, values[name]).data
                for name, array in (("a", a), ("b", b), ("init", init), ("out", out))
            }
            size = values["depth"].type
            lanes = ir.Constant(size, LANES)

            def at(name, *offsets, wide=False):
                index = offsets[0]
                for offset in offsets[1:]:
                    index = builder.add(index, offset)
                pointer = builder.gep(data[name], [index])
                return builder.bitcast(pointer, vector.as_pointer()) if wide else pointer

            def times(x, n):
                return builder.mul(x, ir.Constant(size, n))

            def load(pointer):
                value = builder.load(pointer)
                value.align = 4
                return value

            sums = [[cgutils.alloca_once(builder, vector) for _ in range(panels)] for _ in range(rows)]
            for r in range(rows):
                for p in range(panels):
                    where = at("init", values["i0"], times(values["i_row"], r), times(lanes, p), wide=True)
                    builder.store(load(where), sums[r][p])
            with cgutils.for_range(builder, values["depth"]) as loop:
                b_here, a_here = builder.mul(loop.index, values["b_step"]), builder.mul(loop.index, values["a_step"])
                bs = [
                    load(at("b", values["b0"], times(values["b_panel"], p), b_here, wide=True)) for p in range(panels)
                ]
                for r in range(rows):
                    scalar = builder.load(at("a", values["a0"], times(values["a_row"], r), a_here))
                    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, lane(0))
                    mask = ir.Constant(ir.VectorType(lane, LANES), [0] * LANES)
                    wide = builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), mask)
                    for p in range(panels):
                        term = builder.fmul(wide, bs[p], flags=["contract"])
                        builder.store(builder.fadd(builder.load(sums[r][p]), term, flags=["contract"]), sums[r][p])
            for r in range(rows):
                for p in range(panels):
                    where = at("out", values["o0"], times(values["o_row"], r), times(lanes, p), wide=True)
                    store = builder.store(builder.load(sums[r][p]), where)
                    store.align = 4
            return context.get_dummy_value()

        n = types.uint64
        return types.void(a, n, n, n, b, n, n, n, init, n, n, out, n, n, n), generate

    return tile


_full, _one_row = _tile(_ROWS, _PANELS), _tile(1, _PANELS)
_one_panel, _one = _tile(_ROWS, 1), _tile(1, 1)


@row
def product(a, a0, a_row, a_step, b, b0, b_panel, b_step, init, i0, i_row, out, o0, o_row, rows, depth, panels):
    """out (rows, panels * LANES) = init + A B.

    A's element (r, k) is a[a0 + r * a_row + k * a_step], B's rows of LANES begin at b[b0 + p * b_panel + k * b_step];
    `init` and `out` have rows i_row and o_row apart and may be the same; i_row = 0 gives every row the same init.
    Offsets, strides and sizes are uint64.
    """
    p = U(0)
    while p < panels:
        many = p + U(_PANELS) <= panels
        shift, bp = p * U(LANES), b0 + p * b_panel
        r = U(0)
        while r < rows:
            four = r + U(_ROWS) <= rows
            ar, i, o = a0 + r * a_row, i0 + r * i_row + shift, o0 + r * o_row + shift
            if many:
                if four:
                    _full(a, ar, a_row, a_step, b, bp, b_panel, b_step, init, i, i_row, out, o, o_row, depth)
                else:
                    _one_row(a, ar, a_row, a_step, b, bp, b_panel, b_step, init, i, i_row, out, o, o_row, depth)
            else:
                if four:
                    _one_panel(a, ar, a_row, a_step, b, bp, b_panel, b_step, init, i, i_row, out, o, o_row, depth)
                else:
                    _one(a, ar, a_row, a_step, b, bp, b_panel, b_step, init, i, i_row, out, o, o_row, depth)
            r += U(_ROWS) if four else U(1)
        p += U(_PANELS) if many else U(1)
