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

# numba compiles for this processor alone, so its width is known here.
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
_ROWS, _PANELS = 4, 4 if LANES == 16 else 2  # a tile: 16 of AVX-512's 32 registers accumulate, or 8 of AVX2's 16


def pack(matrix: Tensor) -> Tensor:
    """(H, K, N) to (H, panels, K, LANES) with N padded by zeros: each panel is read from end to end."""
    heads, depth, width = matrix.shape
    # Zeros behind the last column, so that no tile needs a loop for the rest.
    panels = -(-width // LANES)
    padded = torch.nn.functional.pad(matrix, (0, panels * LANES - width))
    return padded.view(heads, depth, panels, LANES).transpose(1, 2).contiguous()


def _tile(rows: int, panels: int):
    """out[r, p] = init[r, p] + sum_k a[r, k] b[p, k] for vectors of LANES. Matrices as `product` has them; the tile
    begins at the offsets beside them instead of theirs."""

    @intrinsic
    def tile(typing_context, left, a_at, right, b_at, init, i_at, out, o_at, depth):
        def generate(context, builder, signature, arguments):
            vector, lane = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32)
            *views, depth = arguments
            data, starts, strides = [], views[1::2], []
            for kind, view in zip(signature.args[::2], views[::2], strict=False):
                array, _, *apart = cgutils.unpack_tuple(builder, view)
                data.append(context.make_array(kind.types[0])(context, builder, array).data)
                strides.append(apart)
            a, b, first, result = range(4)
            (a_row, a_step), (b_panel, b_step), (i_row,), (o_row,) = strides
            size = depth.type
            lanes = ir.Constant(size, LANES)

            def at(matrix, *offsets, wide=False):
                index = starts[matrix]
                for offset in offsets:
                    index = builder.add(index, offset)
                pointer = builder.gep(data[matrix], [index])
                return builder.bitcast(pointer, vector.as_pointer()) if wide else pointer

            def times(x, n):
                return builder.mul(x, ir.Constant(size, n))

            def load(pointer):
                value = builder.load(pointer)
                # Rows may begin at any float: vectors are loaded and stored unaligned.
                value.align = 4
                return value

            # Memory as it is written, registers as LLVM compiles it, since nothing takes their addresses.
            sums = [[cgutils.alloca_once(builder, vector) for _ in range(panels)] for _ in range(rows)]
            for r in range(rows):
                for p in range(panels):
                    where = at(first, times(i_row, r), times(lanes, p), wide=True)
                    builder.store(load(where), sums[r][p])
            with cgutils.for_range(builder, depth) as loop:
                b_here, a_here = builder.mul(loop.index, b_step), builder.mul(loop.index, a_step)
                bs = [load(at(b, times(b_panel, p), b_here, wide=True)) for p in range(panels)]
                for r in range(rows):
                    scalar = builder.load(at(a, times(a_row, r), a_here))
                    # One element in all lanes.
                    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, lane(0))
                    mask = ir.Constant(ir.VectorType(lane, LANES), [0] * LANES)
                    wide = builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), mask)
                    for p in range(panels):
                        # "contract" alone: the two become a fused multiply-add, and sums keep their order.
                        term = builder.fmul(wide, bs[p], flags=["contract"])
                        builder.store(builder.fadd(builder.load(sums[r][p]), term, flags=["contract"]), sums[r][p])
            for r in range(rows):
                for p in range(panels):
                    where = at(result, times(o_row, r), times(lanes, p), wide=True)
                    store = builder.store(builder.load(sums[r][p]), where)
                    store.align = 4
            return context.get_dummy_value()

        n = types.uint64
        return types.void(left, n, right, n, init, n, out, n, n), generate

    return tile


_full, _one_row = _tile(_ROWS, _PANELS), _tile(1, _PANELS)
_one_panel, _one = _tile(_ROWS, 1), _tile(1, 1)


@row
def product(left, right, init, out, rows, depth, panels):
    """out (rows, panels * LANES) = init + A B.

    Each matrix is a flat array with what leads to its elements, in uint64 as the sizes are:

    - `left` (a, a0, a_row, a_step): A's element (r, k) is a[a0 + r * a_row + k * a_step].
    - `right` (b, b0, b_panel, b_step): B's rows of LANES begin at b[b0 + p * b_panel + k * b_step].
    - `init` (i, i0, i_row) and `out` (o, o0, o_row): rows lie i_row and o_row apart. Both may be the same; i_row = 0
      gives every row the same init.
    """
    _, a0, a_row, _ = left
    _, b0, b_panel, _ = right
    _, i0, i_row = init
    _, o0, o_row = out
    p = U(0)
    # Panels outside: those of a tile stay in the first cache while all rows pass by.
    while p < panels:
        many = p + U(_PANELS) <= panels
        shift, b = p * U(LANES), b0 + p * b_panel
        r = U(0)
        while r < rows:
            four = r + U(_ROWS) <= rows
            # Offsets beside the matrices: a new tuple for each tile would count references to its array.
            a, i, o = a0 + r * a_row, i0 + r * i_row + shift, o0 + r * o_row + shift
            # Four kernels of fixed sizes instead of one with loops, whose sums would not stay in registers.
            if many:
                if four:
                    _full(left, a, right, b, init, i, out, o, depth)
                else:
                    _one_row(left, a, right, b, init, i, out, o, depth)
            else:
                if four:
                    _one_panel(left, a, right, b, init, i, out, o, depth)
                else:
                    _one(left, a, right, b, init, i, out, o, depth)
            r += U(_ROWS) if four else U(1)
        p += U(_PANELS) if many else U(1)
