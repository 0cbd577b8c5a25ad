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
    """out[r, p] = init[r, p] + sum_k a[r, k] b[p, k] for vectors of LANES. Arguments as those of `product`."""

    @intrinsic
    def tile(typing_context, a, a_places, b, b_places, init, init_places, out, out_places, depth):
        def generate(context, builder, signature, arguments):
            vector, lane = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32)
            *matrices, depth = arguments
            arrays = zip(signature.args[::2], matrices[::2], strict=False)
            data = [context.make_array(kind)(context, builder, array).data for kind, array in arrays]
            places = [cgutils.unpack_tuple(builder, place) for place in matrices[1::2]]
            (_, a_row, a_step), (_, b_panel, b_step), (_, i_row), (_, o_row) = places
            left, right, first, result = range(4)
            size = depth.type
            lanes = ir.Constant(size, LANES)

            def at(matrix, *offsets, wide=False):
                index = places[matrix][0]
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
                bs = [load(at(right, times(b_panel, p), b_here, wide=True)) for p in range(panels)]
                for r in range(rows):
                    scalar = builder.load(at(left, times(a_row, r), a_here))
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

        matrices = (a, a_places, b, b_places, init, init_places, out, out_places)
        return types.void(*matrices, types.uint64), generate

    return tile


_full, _one_row = _tile(_ROWS, _PANELS), _tile(1, _PANELS)
_one_panel, _one = _tile(_ROWS, 1), _tile(1, 1)


@row
def product(a, a_places, b, b_places, init, init_places, out, out_places, rows, depth, panels):
    """out (rows, panels * LANES) = init + A B.

    Each matrix is a flat array and, beside it, what leads to its elements, in uint64 as the sizes are:

    - (a0, a_row, a_step): A's element (r, k) is a[a0 + r * a_row + k * a_step].
    - (b0, b_panel, b_step): B's rows of LANES begin at b[b0 + p * b_panel + k * b_step].
    - (i0, i_row) and (o0, o_row): rows lie i_row and o_row apart. `init` and `out` may be the same; i_row = 0 gives
      every row the same init.
    """
    # Arrays stay outside the tuples: a new tuple with an array in it would count references, at each call.
    (a0, a_row, a_step), (b0, b_panel, b_step), (i0, i_row), (o0, o_row) = a_places, b_places, init_places, out_places
    p = U(0)
    # Panels outside: those of a tile stay in the first cache while all rows pass by.
    while p < panels:
        many = p + U(_PANELS) <= panels
        shift, b_at = p * U(LANES), (b0 + p * b_panel, b_panel, b_step)
        r = U(0)
        while r < rows:
            four = r + U(_ROWS) <= rows
            a_at, o_at = (a0 + r * a_row, a_row, a_step), (o0 + r * o_row + shift, o_row)
            i_at = (i0 + r * i_row + shift, i_row)
            # Four kernels of fixed sizes instead of one with loops, whose sums would not stay in registers.
            if many:
                if four:
                    _full(a, a_at, b, b_at, init, i_at, out, o_at, depth)
                else:
                    _one_row(a, a_at, b, b_at, init, i_at, out, o_at, depth)
            else:
                if four:
                    _one_panel(a, a_at, b, b_at, init, i_at, out, o_at, depth)
                else:
                    _one(a, a_at, b, b_at, init, i_at, out, o_at, depth)
            r += U(_ROWS) if four else U(1)
        p += U(_PANELS) if many else U(1)
