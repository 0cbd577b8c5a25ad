"""Where an operation finds its operands: in a space, whose address comes with the call, at an offset that the program
knows.

An operation is a function (line, factors, bases, rows, part, parts): an instruction's columns and factors, addresses of
the spaces; what it does is the `part` of `parts`, of a product's outputs or of the rows.
"""

from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from hf_rnn_kernels.fused_step import program
from hf_rnn_kernels.vector_math import U

FIRST = int(program.FIRST)
ALL = 2**40  # numbers behind an address: as many as one asks for


def _pointer_to(kind, llvm):
    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], llvm.as_pointer())

        return types.CPointer(kind)(types.int64), generate

    return pointer


floats_at, bytes_at = _pointer_to(types.float32, ir.FloatType()), _pointer_to(types.uint8, ir.IntType(8))
longs_at = _pointer_to(types.int64, ir.IntType(64))


@njit
def operand(line, number, bases):
    """An operand's numbers, and how far apart its rows are."""
    at = FIRST + 3 * number
    return carray(floats_at(bases[line[at]] + line[at + 1]), ALL), U(line[at + 2])
