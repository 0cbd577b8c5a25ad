"""The compiled loop that runs a program: one call a token.

An operand lies in a space, whose address comes with the call, at an offset that the program knows. Each operation is
compiled by itself when a program first has it, and called by its address: all of them at once took 20 seconds.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from hf_rnn_kernels.cpu_cache import LoopCache, loop
from hf_rnn_kernels.fused_step.program import COLUMNS, FIRST, Op
from hf_rnn_kernels.matrix_product import LANES
from hf_rnn_kernels.packed_linear.cpu import FEW, TILE, packed_dot, panels_of, starts, times_panels, unpack_row
from hf_rnn_kernels.vector_math import (
    F32,
    FAST,
    HALF,
    ONE,
    U,
    decay,
    exp,
    inline,
    log_sigmoid,
    parallel,
    row,
    sigmoids,
    tanh,
)

_sums = njit(fastmath=FAST | {"reassoc"}, error_model="numpy")  # sums in any order, so that they vectorise
_compiled = loop(fastmath=FAST, error_model="numpy")
_FIRST, _COLUMNS, _PRODUCTS = int(FIRST), int(COLUMNS), int(Op.PACKED)
_MANY = U(16)  # rows of a part that are shared out where there is no matrix, or one of at most `_SMALL` numbers
_SMALL = U(2**19)
_ALL = 2**40  # numbers behind an address: as many as one asks for

_LONGS, _FLOATS = types.CPointer(types.int64), types.CPointer(types.float32)
_ARGUMENTS = (_LONGS, _FLOATS, _LONGS, types.uint64, types.uint64, types.uint64)
_FUNCTIONS: dict[Op, Callable] = {}


def _operation(op: Op) -> Callable[[Callable], Callable]:
    """(line, factors, bases, rows, part, parts): an instruction's columns and factors, addresses of the spaces; what is
    done is the `part` of `parts`, of a product's outputs or of the rows."""

    def keep(function: Callable) -> Callable:
        _FUNCTIONS[op] = function
        return function

    return keep


@cache
def address(op: Op) -> int:
    """Where the compiled operation lies."""
    options = dict(fastmath=FAST, error_model="numpy", nopython=True)
    function = CFunc(_FUNCTIONS[op], (_ARGUMENTS, types.void), locals={}, options=options)
    function._cache = LoopCache(_FUNCTIONS[op])
    function.compile()
    _KEPT.append(function)
    return function.address


_KEPT: list[CFunc] = []  # whose code the addresses are of


def _pointer_to(kind, llvm):
    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], llvm.as_pointer())

        return types.CPointer(kind)(types.int64), generate

    return pointer


_float_pointer, _byte_pointer = _pointer_to(types.float32, ir.FloatType()), _pointer_to(types.uint8, ir.IntType(8))
_long_pointer = _pointer_to(types.int64, ir.IntType(64))


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
    """One instruction after another."""
    for n in range(U(addresses.size)):
        _call(addresses[n], code, factors, n, bases, U(rows), U(0), U(1))


@parallel
def some_threads(code, factors, bases, addresses, rows, parts):
    """Each thread has some of the outputs of every product, and of many rows some in everything else."""
    for n in range(U(addresses.size)):
        if code[n, 0] <= _PRODUCTS or rows >= _MANY * parts:
            for part in prange(parts):
                _call(addresses[n], code, factors, n, bases, U(rows), U(part), U(parts))
        else:
            _call(addresses[n], code, factors, n, bases, U(rows), U(0), U(1))


@njit
def _operand(line, operand, bases):
    """An operand's numbers, and how far apart its rows are."""
    at = _FIRST + 3 * operand
    return carray(_float_pointer(bases[line[at]] + line[at + 1]), _ALL), U(line[at + 2])


@_sums
def _eight_dots(size, w, w0, x, x0, x1):
    """Four rows of a matrix, which are read once, times two vectors."""
    a, b, c, d, e, f, g, h = F32(0), F32(0), F32(0), F32(0), F32(0), F32(0), F32(0), F32(0)
    for i in range(size):
        p, q, r, s = w[w0 + i], w[w0 + size + i], w[w0 + U(2) * size + i], w[w0 + U(3) * size + i]
        a += p * x[x0 + i]
        b += q * x[x0 + i]
        c += r * x[x0 + i]
        d += s * x[x0 + i]
        e += p * x[x1 + i]
        f += q * x[x1 + i]
        g += r * x[x1 + i]
        h += s * x[x1 + i]
    return a, b, c, d, e, f, g, h


@_sums
def _dot(size, w, w0, x, x0):
    total = F32(0)
    for i in range(size):
        total += w[w0 + i] * x[x0 + i]
    return total


@row
def _few_rows(inputs, w, w0, o, end, x, x0, x_apart, y, y0, y_apart, rows):
    """y += rows `o` to `end` of a matrix times each of a few rows of x: two at a time, the last one alone."""
    if rows > U(1):
        while o + U(4) <= end:
            r = U(0)
            while r + U(2) <= rows:
                at, to = x0 + r * x_apart, y0 + r * y_apart + o
                a, b, c, d, e, f, g, h = _eight_dots(inputs, w, w0 + o * inputs, x, at, at + x_apart)
                y[to] += a
                y[to + U(1)] += b
                y[to + U(2)] += c
                y[to + U(3)] += d
                to += y_apart
                y[to] += e
                y[to + U(1)] += f
                y[to + U(2)] += g
                y[to + U(3)] += h
                r += U(2)
            if r < rows:
                for k in range(o, o + U(4)):
                    y[y0 + r * y_apart + k] += _dot(inputs, w, w0 + k * inputs, x, x0 + r * x_apart)
            o += U(4)
    for k in range(o, end):
        for r in range(rows):
            y[y0 + r * y_apart + k] += _dot(inputs, w, w0 + k * inputs, x, x0 + r * x_apart)


@row
def _many_rows(inputs, w, w0, o, end, laid, panels, block, y, y0, y_apart, rows):
    """The same for many rows of x, laid out by `panels_of`: a tile of the matrix stays in the cache while they pass."""
    wide = panels * U(LANES)
    while o < end:
        count = min(TILE, end - o)
        times_panels(w, w0 + o * inputs, count, inputs, laid, panels, block)
        for r in range(rows):
            for k in range(count):
                y[y0 + r * y_apart + o + k] += block[k * wide + r]
        o += count


@row
def _packed_rows(
    bits, inputs, group, packed, scale, above, o, end, x, x0, x_apart, y, y0, y_apart, rows, laid, panels, block
):
    """Both with packed weights, some rows of which are unpacked at a time; `above` them lie other groups' rows."""
    tile = U(4) if rows <= FEW else TILE
    plain = np.empty(tile * inputs, np.float32)
    while o < end:
        count = min(tile, end - o)
        for k in range(count):
            unpack_row(bits, inputs, group, packed, scale, above + o + k, plain, k * inputs)
        if rows <= FEW:
            _few_rows(inputs, plain, U(0), U(0), count, x, x0, x_apart, y, y0 + o, y_apart, rows)
        else:
            _many_rows(inputs, plain, U(0), U(0), count, laid, panels, block, y, y0 + o, y_apart, rows)
        o += count


@njit
def _range(outputs, part, parts):
    """The outputs of a part, but for the last one whole fours."""
    o, end = outputs * part // parts // U(4) * U(4), outputs * (part + U(1)) // parts // U(4) * U(4)
    return o, outputs if part + U(1) == parts else end


@row
def _begin(o, end, y, y0, y_apart, rows, bias, b0, has_bias):
    """What a product is added to: its bias, or zeros."""
    for r in range(rows):
        for d in range(o, end):
            y[y0 + r * y_apart + d] = bias[b0 + d] if has_bias else F32(0)


@_operation(Op.LINEAR_ONE)
def _linear_one(line, factors, bases, rows, part, parts):
    """y = W x + b for one row, each of its groups for itself."""
    groups, outputs, inputs = U(line[2]), U(line[3]), U(line[4])
    x, _ = _operand(line, 0, bases)
    w, _ = _operand(line, 1, bases)
    bias, _ = _operand(line, 2, bases)
    y, _ = _operand(line, 3, bases)
    o, end = _range(outputs, part, parts)
    for k in range(groups):
        above = k * outputs
        _begin(o, end, y, above, U(0), U(1), bias, above, line[_FIRST + 7] != 0)
        for d in range(o, end):
            y[above + d] += _dot(inputs, w, (above + d) * inputs, x, k * inputs)


@_operation(Op.LINEAR)
def _linear(line, factors, bases, rows, part, parts):
    """The same for several rows."""
    groups, outputs, inputs = U(line[2]), U(line[3]), U(line[4])
    x, x_apart = _operand(line, 0, bases)
    w, _ = _operand(line, 1, bases)
    bias, _ = _operand(line, 2, bases)
    y, y_apart = _operand(line, 3, bases)
    o, end, first = U(0), outputs, U(0)
    if rows >= _MANY * parts and outputs * inputs <= _SMALL:
        first, rows = rows * part // parts, rows * (part + U(1)) // parts - rows * part // parts
    else:
        o, end = _range(outputs, part, parts)
    panels = U(0) if rows <= FEW else (rows + U(LANES - 1)) // U(LANES)
    block = np.empty(TILE * panels * U(LANES), np.float32)
    for k in range(groups):
        above, x0, y0 = k * outputs, first * x_apart + k * inputs, first * y_apart + k * outputs
        _begin(o, end, y, y0, y_apart, rows, bias, above, line[_FIRST + 7] != 0)
        if rows <= FEW:
            _few_rows(inputs, w, above * inputs, o, end, x, x0, x_apart, y, y0, y_apart, rows)
        else:
            laid = panels_of(panels, rows, inputs, x, x0, x_apart)
            _many_rows(inputs, w, above * inputs, o, end, laid, panels, block, y, y0, y_apart, rows)


@_operation(Op.PACKED_ONE)
def _packed_one(line, factors, bases, rows, part, parts):
    """y = W x + b for one row, with packed weights."""
    bits, groups, outputs, inputs, group = U(line[1]), U(line[2]), U(line[3]), U(line[4]), U(line[5])
    x, _ = _operand(line, 0, bases)
    w = carray(_byte_pointer(line[_FIRST + 4]), _ALL)
    bias, _ = _operand(line, 2, bases)
    y, _ = _operand(line, 3, bases)
    scale, _ = _operand(line, 4, bases)
    o, end = _range(outputs, part, parts)
    for k in range(groups):
        above, x0 = k * outputs, k * inputs
        _begin(o, end, y, above, U(0), U(1), bias, above, line[_FIRST + 7] != 0)
        start = starts(bits, inputs, group, x, x0)
        for d in range(o, end):
            y[above + d] += packed_dot(bits, inputs, group, w, scale, above + d, x, x0, start)


@_operation(Op.PACKED)
def _packed(line, factors, bases, rows, part, parts):
    """The same for several rows."""
    bits, groups, outputs, inputs, group = U(line[1]), U(line[2]), U(line[3]), U(line[4]), U(line[5])
    x, x_apart = _operand(line, 0, bases)
    w = carray(_byte_pointer(line[_FIRST + 4]), _ALL)
    bias, _ = _operand(line, 2, bases)
    y, y_apart = _operand(line, 3, bases)
    scale, _ = _operand(line, 4, bases)
    o, end = _range(outputs, part, parts)
    panels = U(0) if rows <= FEW else (rows + U(LANES - 1)) // U(LANES)
    block = np.empty(TILE * panels * U(LANES), np.float32)
    for k in range(groups):
        above, x0 = k * outputs, k * inputs
        _begin(o, end, y, above, y_apart, rows, bias, above, line[_FIRST + 7] != 0)
        laid = panels_of(panels, rows, inputs, x, x0, x_apart)
        _packed_rows(
            bits, inputs, group, w, scale, above, o, end, x, x0, x_apart, y, above, y_apart, rows, laid, panels, block
        )


@_operation(Op.EMBED)
def _embed(line, factors, bases, rows, part, parts):
    size, ids = U(line[1]), carray(_long_pointer(bases[line[_FIRST]]), _ALL)
    table, _ = _operand(line, 1, bases)
    y, y_apart = _operand(line, 2, bases)
    for r in range(rows * part // parts, rows * (part + U(1)) // parts):
        at = U(ids[r]) * size
        for d in range(size):
            y[r * y_apart + d] = table[at + d]


@_sums
def _over_deviation(size, centred, x, x0, eps, y, y0):
    """x over the root of its mean square, or less its mean over its deviation."""
    mean, square = F32(0), F32(0)
    if centred:
        for d in range(size):
            mean += x[x0 + d]
        mean /= F32(size)
    for d in range(size):
        square += (x[x0 + d] - mean) * (x[x0 + d] - mean)
    scale = ONE / np.sqrt(square / F32(size) + eps)
    for d in range(size):
        y[y0 + d] = (x[x0 + d] - mean) * scale


@_operation(Op.NORM)
def _norm(line, factors, bases, rows, part, parts):
    size, heads, has_weight = U(line[1]), U(line[2]), line[4]
    x, x_apart = _operand(line, 0, bases)
    weight, _ = _operand(line, 1, bases)
    y, y_apart = _operand(line, 2, bases)
    for r in range(rows * part // parts, rows * (part + U(1)) // parts):
        for k in range(heads):
            _over_deviation(size, line[3], x, r * x_apart + k * size, factors[0], y, r * y_apart + k * size)
        if has_weight:
            for d in range(size * heads):
                y[r * y_apart + d] *= weight[d]


@inline
def _gelu_of(x):
    """x Phi(x), erfc by Abramowitz and Stegun's 7.1.26, to 1.5e-7."""
    z = abs(x) * F32(0.7071067811865476)
    t = ONE / (ONE + F32(0.3275911) * z)
    p = (((F32(1.061405429) * t - F32(1.453152027)) * t + F32(1.421413741)) * t - F32(0.284496736)) * t
    tail = HALF * x * ((p + F32(0.254829592)) * t * exp(-z * z))
    return x - tail if x > F32(0) else tail


def _pointwise(op: Op, function: Callable) -> None:
    """y = function(a, b, factor) of each number; where it takes one, b is a."""
    function = inline(function)

    def operation(line, factors, bases, rows, part, parts):
        size, factor = U(line[1]), factors[0]
        a, a_apart = _operand(line, 0, bases)
        b, b_apart = _operand(line, 1, bases)
        y, y_apart = _operand(line, 2, bases)
        for r in range(rows * part // parts, rows * (part + U(1)) // parts):
            a0, b0, y0 = r * a_apart, r * b_apart, r * y_apart
            for d in range(size):
                y[y0 + d] = function(a[a0 + d], b[b0 + d], factor)

    operation.__qualname__ = op.name.lower()  # its name in the cache
    _FUNCTIONS[op] = operation


_pointwise(Op.COPY, lambda a, b, factor: a)
_pointwise(Op.ADD, lambda a, b, factor: a + b)
_pointwise(Op.MULTIPLY, lambda a, b, factor: a * b)
_pointwise(Op.SILU, lambda a, b, factor: a * sigmoids(a)[1])
_pointwise(Op.GELU, lambda a, b, factor: _gelu_of(a))
_pointwise(Op.SILU_MULTIPLY, lambda a, b, factor: a * b * sigmoids(b)[1])
_pointwise(Op.GELU_MULTIPLY, lambda a, b, factor: a * _gelu_of(b))
_pointwise(Op.SIGMOID_MULTIPLY, lambda a, b, factor: a * sigmoids(b)[1])
_pointwise(Op.SOFT_CAP, lambda a, b, factor: factor * tanh(a / factor))


@_operation(Op.CONV)
def _conv(line, factors, bases, rows, part, parts):
    """y = bias + sum_j weight[:, j] * (the inputs before x, oldest first, and x); these move on by one."""
    size, taps = U(line[1]), U(line[2])
    x, x_apart = _operand(line, 0, bases)
    weight, _ = _operand(line, 1, bases)
    bias, _ = _operand(line, 2, bases)
    state, s_apart = _operand(line, 3, bases)
    y, y_apart = _operand(line, 4, bases)
    history = taps - U(1)
    for r in range(rows * part // parts, rows * (part + U(1)) // parts):
        x0, s0, y0 = r * x_apart, r * s_apart, r * y_apart
        for d in range(size):
            y[y0 + d] = bias[d] + weight[d * taps + history] * x[x0 + d]
        for j in range(history):
            for d in range(size):
                y[y0 + d] += weight[d * taps + j] * state[s0 + j * size + d]
            if j > U(0):
                for d in range(size):
                    state[s0 + (j - U(1)) * size + d] = state[s0 + j * size + d]
        for d in range(size):
            state[s0 + (history - U(1)) * size + d] = x[x0 + d]


@_operation(Op.LSTM)
def _lstm(line, factors, bases, rows, part, parts):
    size, heads = U(line[1]), U(line[2])
    gates, x_apart = _operand(line, 0, bases)
    recurrent, r_apart = _operand(line, 1, bases)
    h, h_apart = _operand(line, 2, bases)
    state, s_apart = _operand(line, 3, bases)
    c, c_apart = _operand(line, 4, bases)
    for n in range(rows * part // parts * heads, rows * (part + U(1)) // parts * heads):
        r, k = n // heads, n % heads
        x0, r0 = r * x_apart + U(4) * k * size, r * r_apart + U(4) * k * size
        h0, s0, c0 = r * h_apart + k * size, r * s_apart + k * size, r * c_apart + k * size
        for p in range(size):
            keep = sigmoids(gates[x0 + size + p] + recurrent[r0 + size + p])[1]
            new = tanh(gates[x0 + U(2) * size + p] + recurrent[r0 + U(2) * size + p])
            c[c0 + p] = keep * c[c0 + p] + sigmoids(gates[x0 + p] + recurrent[r0 + p])[1] * new
        for p in range(size):
            is_open = sigmoids(gates[x0 + U(3) * size + p] + recurrent[r0 + U(3) * size + p])[1]
            state[s0 + p] = is_open * tanh(c[c0 + p])
        for p in range(size):
            h[h0 + p] = state[s0 + p]


@_operation(Op.GRU)
def _gru(line, factors, bases, rows, part, parts):
    size, heads = U(line[1]), U(line[2])
    gates, x_apart = _operand(line, 0, bases)
    recurrent, r_apart = _operand(line, 1, bases)
    h, h_apart = _operand(line, 2, bases)
    state, s_apart = _operand(line, 3, bases)
    for n in range(rows * part // parts * heads, rows * (part + U(1)) // parts * heads):
        r, k = n // heads, n % heads
        x0, r0 = r * x_apart + U(3) * k * size, r * r_apart + U(3) * k * size
        h0, s0 = r * h_apart + k * size, r * s_apart + k * size
        for p in range(size):
            reset = sigmoids(gates[x0 + p] + recurrent[r0 + p])[1]
            z = sigmoids(gates[x0 + size + p] + recurrent[r0 + size + p])[1]
            new = tanh(gates[x0 + U(2) * size + p] + reset * recurrent[r0 + U(2) * size + p])
            state[s0 + p] = new + z * (state[s0 + p] - new)
        for p in range(size):
            h[h0 + p] = state[s0 + p]


@_operation(Op.SLSTM)
def _slstm(line, factors, bases, rows, part, parts):
    size, heads = U(line[1]), U(line[2])
    gates, x_apart = _operand(line, 0, bases)
    recurrent, r_apart = _operand(line, 1, bases)
    h, h_apart = _operand(line, 2, bases)
    state, s_apart = _operand(line, 3, bases)
    cells, _ = _operand(line, 4, bases)
    normalizers, _ = _operand(line, 5, bases)
    tops, _ = _operand(line, 6, bases)
    for n in range(rows * part // parts * heads, rows * (part + U(1)) // parts * heads):
        r, k = n // heads, n % heads
        x0, r0 = r * x_apart + U(4) * k * size, r * r_apart + U(4) * k * size
        h0, s0 = r * h_apart + k * size, r * s_apart + k * size
        for p in range(size):
            i = gates[x0 + p] + recurrent[r0 + p]
            z = tanh(gates[x0 + U(2) * size + p] + recurrent[r0 + U(2) * size + p])
            o = sigmoids(gates[x0 + U(3) * size + p] + recurrent[r0 + U(3) * size + p])[1]
            kept = log_sigmoid(gates[x0 + size + p] + recurrent[r0 + size + p])[0] + tops[s0 + p]
            empty = normalizers[s0 + p] == F32(0)
            m = i if empty or i > kept else kept
            add, keep = exp(i - m), F32(0) if empty else exp(kept - m)
            tops[s0 + p] = m
            cells[s0 + p] = keep * cells[s0 + p] + add * z
            normalizers[s0 + p] = keep * normalizers[s0 + p] + add
            state[s0 + p] = o * cells[s0 + p] / normalizers[s0 + p]
        for p in range(size):
            h[h0 + p] = state[s0 + p]


@inline
def _lerp(h, goal, share, rest):
    """rest * h + share * goal, free of cancellation for gates near 0 and near 1."""
    return h + share * (goal - h) if share < HALF else goal - rest * (goal - h)


@_operation(Op.MIN_GRU)
def _min_gru(line, factors, bases, rows, part, parts):
    size, use_g = U(line[1]), line[2]
    h, h_apart = _operand(line, 0, bases)
    state, s_apart = _operand(line, 1, bases)
    gate, g_apart = _operand(line, 2, bases)
    candidate, x_apart = _operand(line, 3, bases)
    for r in range(rows * part // parts, rows * (part + U(1)) // parts):
        h0, s0, g0, x0 = r * h_apart, r * s_apart, r * g_apart, r * x_apart
        for p in range(size):
            rest, share = sigmoids(gate[g0 + p])
            goal = candidate[x0 + p]
            if use_g:
                goal = goal + HALF if goal >= F32(0) else sigmoids(goal)[1]
            state[s0 + p] = _lerp(state[s0 + p], goal, share, rest)
        for p in range(size):
            h[h0 + p] = state[s0 + p]


@_operation(Op.MIN_LSTM)
def _min_lstm(line, factors, bases, rows, part, parts):
    size, use_g, normalize = U(line[1]), line[2], line[3]
    h, h_apart = _operand(line, 0, bases)
    state, s_apart = _operand(line, 1, bases)
    forget, f_apart = _operand(line, 2, bases)
    input_, i_apart = _operand(line, 3, bases)
    candidate, x_apart = _operand(line, 4, bases)
    for r in range(rows * part // parts, rows * (part + U(1)) // parts):
        h0, s0, f0, i0, x0 = r * h_apart, r * s_apart, r * f_apart, r * i_apart, r * x_apart
        for p in range(size):
            goal, f, i = candidate[x0 + p], forget[f0 + p], input_[i0 + p]
            if use_g:
                goal = goal + HALF if goal >= F32(0) else sigmoids(goal)[1]
            if normalize:
                rest, share = sigmoids(log_sigmoid(i)[0] - log_sigmoid(f)[0])
                state[s0 + p] = _lerp(state[s0 + p], goal, share, rest)
            else:
                drop, keep = sigmoids(f)
                state[s0 + p] = decay(keep, drop, state[s0 + p]) + sigmoids(i)[1] * goal
        for p in range(size):
            h[h0 + p] = state[s0 + p]


@_operation(Op.MLSTM)
def _mlstm(line, factors, bases, rows, part, parts):
    """q is divided by sqrt(keys) here; of `gates` the first halves are i."""
    heads, keys, values, eps = U(line[1]), U(line[2]), U(line[3]), factors[0]
    q, q_apart = _operand(line, 0, bases)
    key, k_apart = _operand(line, 1, bases)
    v, v_apart = _operand(line, 2, bases)
    gates, g_apart = _operand(line, 3, bases)
    h, h_apart = _operand(line, 4, bases)
    memory, c_apart = _operand(line, 5, bases)
    normalizer, n_apart = _operand(line, 6, bases)
    tops = carray(_float_pointer(bases[line[4]]), _ALL)
    root = ONE / np.sqrt(F32(keys))
    for n in range(rows * part // parts * heads, rows * (part + U(1)) // parts * heads):
        r, k = n // heads, n % heads
        q0, k0, v0, g0 = r * q_apart + k * keys, r * k_apart + k * keys, r * v_apart + k * values, r * g_apart + k
        h0, c0, n0 = r * h_apart + k * values, r * c_apart + k * keys * values, r * n_apart + k * keys
        i, kept = gates[g0], log_sigmoid(gates[g0 + heads])[0] + tops[n]
        top = max(kept, i)
        tops[n] = top
        forget, add = exp(kept - top), exp(i - top)
        for a in range(keys):
            normalizer[n0 + a] = forget * normalizer[n0 + a] + add * key[k0 + a]
        divisor = max(abs(_dot(keys, q, q0, normalizer, n0) * root), exp(-top)) + eps
        for b in range(values):
            h[h0 + b] = F32(0)
        for a in range(keys):
            at, written, query = c0 + a * values, add * key[k0 + a], q[q0 + a] * root / divisor
            for b in range(values):
                memory[at + b] = forget * memory[at + b] + written * v[v0 + b]
            for b in range(values):
                h[h0 + b] += query * memory[at + b]
