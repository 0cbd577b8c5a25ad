"""Elementwise functions for numba's loops, in float32, written so that LLVM vectorises them.

A scalar `exp` of libm would cost more than everything else in a recurrence together. Measurements: docs/log.md.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from hf_rnn_kernels.cpu_cache import loop

FAST = {"contract", "nsz"}  # fused multiply-add; nothing that reorders sums or assumes finite values
F32 = np.float32
U = np.uint64  # unsigned indices spare the vectoriser the check for negative ones
HALF, ONE, TWO = F32(0.5), F32(1), F32(2)
# e^87 and e^-87 are the last normal numbers of float32, near enough: nothing here becomes infinite or a denormal.
_LOG2E, ROUND, _LIMIT = F32(1.4426950408889634), F32(1.5 * 2**23), F32(87.0)
# ln(2) in two parts (Cody and Waite): the first has 9 bits, so that n times it is exact for any n that comes up.
_LN2_HIGH, _LN2_LOW = F32(0.693359375), F32(-2.12194440e-4)
# Minimax polynomial of (e^r - 1 - r) / r^2 on |r| <= ln(2)/2 (Cephes, expf)
_P0, _P1, _P2 = F32(1.9875691500e-4), F32(1.3981999507e-3), F32(8.3334519073e-3)
_P3, _P4, _P5 = F32(4.1665795894e-2), F32(1.6666665459e-1), F32(5.0000001201e-1)
# Minimax polynomial of log(1 + e) / e on 0 <= e <= 1, to half an ulp
_L0, _L1, _L2 = F32(0.99999994), F32(-0.499994934), F32(0.333190978)
_L3, _L4, _L5 = F32(-0.24842982), F32(0.191060066), F32(-0.136632442)
_L6, _L7, _L8 = F32(0.078225933), F32(-0.0295052268), F32(0.0052326913)

# `inline` is for what stands in a loop that is to be vectorised, `row` and `sums` for such a loop, `parallel` for what
# starts them.
# Inlined by LLVM, for numba's own inlining took most of a cell's time to compile (docs/log.md, 2026-12-01).
inline = njit(fastmath=FAST, error_model="numpy", forceinline=True)
row = njit(fastmath=FAST, error_model="numpy")
sums = njit(fastmath=FAST | {"reassoc"}, error_model="numpy")  # in any order, so that they vectorise; not around `exp`
parallel = loop(fastmath=FAST, error_model="numpy", parallel=True)


@intrinsic
def as_float(typing_context, bits):
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def as_int(typing_context, value):
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@inline
def _exp_parts(x):
    """2^n and e^r - 1 with e^x = 2^n e^r, |r| <= ln(2)/2, x clamped to +-87; NaN stays NaN."""
    # Comparisons, both false for a NaN, which so stays one.
    x = -_LIMIT if x < -_LIMIT else x
    x = _LIMIT if x > _LIMIT else x
    shifted = x * _LOG2E + ROUND  # adding 1.5 * 2^23 rounds to the nearest integer, held in the low bits
    n = shifted - ROUND
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    # The low bits of `shifted` are n: moved to where the exponent is and added to the bits of 1.0 they make 2^n.
    return as_float((as_int(shifted) << np.int32(23)) + np.int32(0x3F800000)), p * (r * r) + r


@inline
def exp(x):
    """e^x to about an ulp, x clamped to +-87 so that it is finite; NaN stays NaN."""
    scale, rest = _exp_parts(x)
    return (rest + ONE) * scale


@inline
def log(x):
    """Natural logarithm of a normal number above 0, from its exponent and log(1 + e) of its mantissa, 0 <= e < 1."""
    bits = as_int(x)
    e = as_float((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)) - ONE
    p = (((_L8 * e + _L7) * e + _L6) * e + _L5) * e + _L4
    p = (((p * e + _L3) * e + _L2) * e + _L1) * e + _L0
    return F32((bits >> np.int32(23)) - np.int32(127)) * F32(0.6931471805599453) + p * e


@inline
def sigmoids(x):
    """sigmoid(-x) and sigmoid(x), each to the last bits (for |x| < 87), with one exponential and one division."""
    # The exponent is clamped instead of taking |x| first: 111 instead of 122 ns for four gates of 64 units, with errors
    # of 1.9e-7 at most.
    e = exp(-x)  # at most e^87, so that no product overflows
    large = ONE / (ONE + e)
    return e * large, large


@inline
def log_sigmoid(x):
    """log(sigmoid(x)) and sigmoid(-x), each to the last bits (for |x| < 87)."""
    # |x| here, since the polynomial is fitted for 0 <= e <= 1.
    e = exp(-abs(x))
    large = ONE / (ONE + e)
    p = (((_L8 * e + _L7) * e + _L6) * e + _L5) * e + _L4
    p = (((p * e + _L3) * e + _L2) * e + _L1) * e + _L0
    return (x if x < F32(0) else F32(0)) - e * p, large if x < F32(0) else e * large


@inline
def keep_and_drop(x):
    """e^x and 1 - e^x for x <= 0, each to the last bits, and 0 and 1 below -87."""
    scale, rest = _exp_parts(x)
    keep = (rest + ONE) * scale  # before the choice: a branch around it would stop LLVM
    return F32(0) if x < -_LIMIT else keep, (ONE - scale) - scale * rest


@inline
def tanh(x):
    """m / (2 + m) with m = e^(2x) - 1, which keeps small arguments to the last bits."""
    scale, rest = _exp_parts(TWO * x)
    # Not 2 sigmoid(2x) - 1, which loses small arguments; from the polynomial they come for the same cost.
    m = scale * rest + (scale - ONE)
    return m / (TWO + m)


@inline
def decay(keep, drop, x):
    """keep * x for keep + drop = 1, without the rounding of `keep` where it is near 1."""
    return x - drop * x if drop < HALF else keep * x


def ask_for(builder, pointer) -> None:
    """Emit a prefetch of the cache line at an address, which need not exist."""
    i32 = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
    builder.call(function, [pointer, i32(0), i32(3), i32(1)])  # to be read, kept in all caches, data


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of array[index], which need not exist."""

    def generate(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        ask_for(builder, builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate


@sums
def dot(size, x, x0, y, y0):
    total = F32(0)
    for d in range(size):
        total += x[x0 + d] * y[y0 + d]
    return total
