"""Products: y = W x + b, W in float32 or packed, each of its groups for itself.

One row of x goes through dot products, a few share what is read of the matrix in registers, many go through
`matrix_product` with the rows in the lanes.
"""

import numpy as np
from numba import carray, njit

from hf_rnn_kernels.fused_step.cpu_operands import ALL, FIRST, bytes_at, operand
from hf_rnn_kernels.fused_step.program import Op
from hf_rnn_kernels.matrix_product import LANES
from hf_rnn_kernels.packed_linear.cpu import FEW, TILE, packed_dots, panels_of, rounded, times_panels, unpack_row
from hf_rnn_kernels.vector_math import F32, U, dot, row, sums

MANY = U(16)  # rows of a part that are shared out where there is no matrix, or one of at most `_SMALL` numbers
_SMALL = U(2**19)


@sums
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
                    y[y0 + r * y_apart + k] += dot(inputs, w, w0 + k * inputs, x, x0 + r * x_apart)
            o += U(4)
    for k in range(o, end):
        for r in range(rows):  # type: ignore[assignment]
            y[y0 + r * y_apart + k] += dot(inputs, w, w0 + k * inputs, x, x0 + r * x_apart)


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


def linear_one(line, factors, bases, rows, part, parts):
    """y = W x + b for one row, each of its groups for itself."""
    groups, outputs, inputs = U(line[2]), U(line[3]), U(line[4])
    x, _ = operand(line, 0, bases)
    w, _ = operand(line, 1, bases)
    bias, _ = operand(line, 2, bases)
    y, _ = operand(line, 3, bases)
    o, end = _range(outputs, part, parts)
    for k in range(groups):
        above = k * outputs
        _begin(o, end, y, above, U(0), U(1), bias, above, line[FIRST + 7] != 0)
        for d in range(o, end):
            y[above + d] += dot(inputs, w, (above + d) * inputs, x, k * inputs)


def linear(line, factors, bases, rows, part, parts):
    """The same for several rows."""
    groups, outputs, inputs = U(line[2]), U(line[3]), U(line[4])
    x, x_apart = operand(line, 0, bases)
    w, _ = operand(line, 1, bases)
    bias, _ = operand(line, 2, bases)
    y, y_apart = operand(line, 3, bases)
    o, end, first = U(0), outputs, U(0)
    if rows >= MANY * parts and outputs * inputs <= _SMALL:
        first, rows = rows * part // parts, rows * (part + U(1)) // parts - rows * part // parts
    else:
        o, end = _range(outputs, part, parts)
    panels = U(0) if rows <= FEW else (rows + U(LANES - 1)) // U(LANES)
    block = np.empty(TILE * panels * U(LANES), np.float32)
    for k in range(groups):
        above, x0, y0 = k * outputs, first * x_apart + k * inputs, first * y_apart + k * outputs
        _begin(o, end, y, y0, y_apart, rows, bias, above, line[FIRST + 7] != 0)
        if rows <= FEW:
            _few_rows(inputs, w, above * inputs, o, end, x, x0, x_apart, y, y0, y_apart, rows)
        else:
            laid = panels_of(panels, rows, inputs, x, x0, x_apart)
            _many_rows(inputs, w, above * inputs, o, end, laid, panels, block, y, y0, y_apart, rows)


def packed_one(line, factors, bases, rows, part, parts):
    """y = W x + b for one row, with packed weights."""
    bits, groups, outputs, inputs, group = U(line[1]), U(line[2]), U(line[3]), U(line[4]), U(line[5])
    x, _ = operand(line, 0, bases)
    w = carray(bytes_at(line[FIRST + 4]), ALL)
    bias, _ = operand(line, 2, bases)
    y, _ = operand(line, 3, bases)
    scale, _ = operand(line, 4, bases)
    o, end = _range(outputs, part, parts)
    for k in range(groups):
        above, x0 = k * outputs, k * inputs
        _begin(o, end, y, above, U(0), U(1), bias, above, line[FIRST + 7] != 0)
        q, x_scale, start = rounded(bits, inputs, group, x, x0)
        packed_dots(bits, inputs, group, w, scale, above + o, above + end, x, x0, q, x_scale, start, y, U(0))


def packed(line, factors, bases, rows, part, parts):
    """The same for several rows."""
    bits, groups, outputs, inputs, group = U(line[1]), U(line[2]), U(line[3]), U(line[4]), U(line[5])
    x, x_apart = operand(line, 0, bases)
    w = carray(bytes_at(line[FIRST + 4]), ALL)
    bias, _ = operand(line, 2, bases)
    y, y_apart = operand(line, 3, bases)
    scale, _ = operand(line, 4, bases)
    o, end = _range(outputs, part, parts)
    panels = U(0) if rows <= FEW else (rows + U(LANES - 1)) // U(LANES)
    block = np.empty(TILE * panels * U(LANES), np.float32)
    for k in range(groups):
        above, x0 = k * outputs, k * inputs
        _begin(o, end, y, above, y_apart, rows, bias, above, line[FIRST + 7] != 0)
        laid = panels_of(panels, rows, inputs, x, x0, x_apart)
        _packed_rows(
            bits, inputs, group, w, scale, above, o, end, x, x0, x_apart, y, above, y_apart, rows, laid, panels, block
        )


PRODUCTS = {Op.LINEAR_ONE: linear_one, Op.LINEAR: linear, Op.PACKED_ONE: packed_one, Op.PACKED: packed}
