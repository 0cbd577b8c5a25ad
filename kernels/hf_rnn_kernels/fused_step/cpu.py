"""The compiled loop that runs a program: one call a token.

Each operation is compiled by itself when a program first has it, and called by its address: all of them in one function
took 20 seconds.
"""

from functools import cache

from llvmlite import ir
from numba import prange, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from hf_rnn_kernels.cpu_cache import LoopCache, loop
from hf_rnn_kernels.fused_step.cpu_cells import CELLS
from hf_rnn_kernels.fused_step.cpu_layers import LAYERS
from hf_rnn_kernels.fused_step.cpu_products import MANY, PRODUCTS
from hf_rnn_kernels.fused_step.program import COLUMNS, Op
from hf_rnn_kernels.vector_math import FAST, U, parallel

_compiled = loop(fastmath=FAST, error_model="numpy")
_COLUMNS, _LAST_PRODUCT = int(COLUMNS), int(max(PRODUCTS))
_LONGS, _FLOATS = types.CPointer(types.int64), types.CPointer(types.float32)
_ARGUMENTS = (_LONGS, _FLOATS, _LONGS, types.uint64, types.uint64, types.uint64)
_OPERATIONS = {**PRODUCTS, **LAYERS, **CELLS}


@cache
def operation(op: Op) -> CFunc:
    """The operation, compiled or from the cache; it has to live as long as its `address` is called."""
    options = dict(fastmath=FAST, error_model="numpy", nopython=True)
    function = CFunc(_OPERATIONS[op], (_ARGUMENTS, types.void), locals={}, options=options)
    function._cache = LoopCache(_OPERATIONS[op])
    function.compile()
    return function


@intrinsic
def _call(typing_context, address, code, factors, n, bases, rows, part, parts):
    """The operation at an address, for instruction n."""

    def generate(context, builder, signature, arguments):
        address, code, factors, n, bases, *numbers = arguments
        longs, floats = ir.IntType(64).as_pointer(), ir.FloatType().as_pointer()
        of = signature.args
        data = [context.make_array(of[k])(context, builder, x).data for k, x in ((1, code), (2, factors), (4, bases))]
        kind = ir.FunctionType(ir.VoidType(), [longs, floats, longs, *[ir.IntType(64)] * 3])
        function = builder.inttoptr(address, kind.as_pointer())
        line = builder.gep(data[0], [builder.mul(n, n.type(_COLUMNS))])
        builder.call(function, [line, builder.gep(data[1], [builder.mul(n, n.type(2))]), data[2], *numbers])
        return context.get_dummy_value()

    u64 = types.uint64
    return types.void(types.int64, code, factors, u64, bases, u64, u64, u64), generate


@_compiled
def one_thread(code, factors, bases, addresses, rows):
    """One instruction after another, each of so many rows."""
    for n in range(U(addresses.size)):
        _call(addresses[n], code, factors, n, bases, U(rows[n]), U(0), U(1))


@parallel
def some_threads(code, factors, bases, addresses, rows, parts):
    """Each thread has some of the outputs of every product, and of many rows some in everything else."""
    for n in range(U(addresses.size)):
        if code[n, 0] <= _LAST_PRODUCT or rows[n] >= MANY * parts:
            for part in prange(parts):
                _call(addresses[n], code, factors, n, bases, U(rows[n]), U(part), U(parts))
        else:
            _call(addresses[n], code, factors, n, bases, U(rows[n]), U(0), U(1))
