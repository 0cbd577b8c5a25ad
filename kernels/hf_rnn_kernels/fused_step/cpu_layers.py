"""What stands between products: the embedding, norms, convolutions, functions of each number."""

from collections.abc import Callable

import numpy as np
from numba import carray

from hf_rnn_kernels.fused_step.cpu_operands import ALL, FIRST, longs_at, operand
from hf_rnn_kernels.fused_step.program import Op
from hf_rnn_kernels.gated_norm.cpu import statistics
from hf_rnn_kernels.vector_math import F32, HALF, ONE, U, exp, inline, row, sigmoids, sums, tanh


def embed(line, factors, bases, rows, part, parts):
    size, ids = U(line[1]), carray(longs_at(bases[line[FIRST]]), ALL)
    table, _ = operand(line, 1, bases)
    y, y_apart = operand(line, 2, bases)
    for r in range(rows * part // parts, rows * (part + U(1)) // parts):
        at = U(ids[r]) * size
        for d in range(size):
            y[r * y_apart + d] = table[at + d]


@sums
def _over_root_mean_square(size, x, x0, eps, y, y0):
    square = F32(0)
    for d in range(size):
        square += x[x0 + d] * x[x0 + d]
    scale = ONE / np.sqrt(square / F32(size) + eps)
    for d in range(size):
        y[y0 + d] = x[x0 + d] * scale


@row
def _over_deviation(size, x, x0, eps, y, y0):
    mean, scale = statistics(size, x, x0, eps)
    for d in range(size):
        y[y0 + d] = (x[x0 + d] - mean) * scale


def _norm(op: Op, normalize: Callable) -> Callable:
    """Two operations, for a model has one of them, and the other would be compiled with it."""

    def operation(line, factors, bases, rows, part, parts):
        size, heads, has_weight = U(line[1]), U(line[2]), line[3]
        x, x_apart = operand(line, 0, bases)
        weight, _ = operand(line, 1, bases)
        y, y_apart = operand(line, 2, bases)
        for r in range(rows * part // parts, rows * (part + U(1)) // parts):
            for k in range(heads):
                normalize(size, x, r * x_apart + k * size, factors[0], y, r * y_apart + k * size)
            if has_weight:
                for d in range(size * heads):
                    y[r * y_apart + d] *= weight[d]

    operation.__qualname__ = op.name.lower()  # its name in the cache
    return operation


@inline
def _gelu_of(x):
    """x Phi(x), erfc by Abramowitz and Stegun's 7.1.26, to 1.5e-7."""
    z = abs(x) * F32(0.7071067811865476)
    t = ONE / (ONE + F32(0.3275911) * z)
    p = (((F32(1.061405429) * t - F32(1.453152027)) * t + F32(1.421413741)) * t - F32(0.284496736)) * t
    tail = HALF * x * ((p + F32(0.254829592)) * t * exp(-z * z))
    return x - tail if x > F32(0) else tail


def _pointwise(op: Op, function: Callable) -> Callable:
    """y = function(a, b, factor) of each number; where it takes one, b is a."""
    function = inline(function)

    def operation(line, factors, bases, rows, part, parts):
        size, factor = U(line[1]), factors[0]
        a, a_apart = operand(line, 0, bases)
        b, b_apart = operand(line, 1, bases)
        y, y_apart = operand(line, 2, bases)
        for r in range(rows * part // parts, rows * (part + U(1)) // parts):
            a0, b0, y0 = r * a_apart, r * b_apart, r * y_apart
            for d in range(size):
                y[y0 + d] = function(a[a0 + d], b[b0 + d], factor)

    operation.__qualname__ = op.name.lower()  # its name in the cache
    return operation


def conv(line, factors, bases, rows, part, parts):
    """y = bias + sum_j weight[:, j] * (the inputs before x, oldest first, and x); these move on by one."""
    size, taps = U(line[1]), U(line[2])
    x, x_apart = operand(line, 0, bases)
    weight, _ = operand(line, 1, bases)
    bias, _ = operand(line, 2, bases)
    state, s_apart = operand(line, 3, bases)
    y, y_apart = operand(line, 4, bases)
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


_FUNCTIONS: dict[Op, Callable] = {
    Op.COPY: lambda a, b, factor: a,
    Op.ADD: lambda a, b, factor: a + b,
    Op.MULTIPLY: lambda a, b, factor: a * b,
    Op.SILU: lambda a, b, factor: a * sigmoids(a)[1],
    Op.GELU: lambda a, b, factor: _gelu_of(a),
    Op.SILU_MULTIPLY: lambda a, b, factor: a * b * sigmoids(b)[1],
    Op.GELU_MULTIPLY: lambda a, b, factor: a * _gelu_of(b),
    Op.SIGMOID_MULTIPLY: lambda a, b, factor: a * sigmoids(b)[1],
    Op.SOFT_CAP: lambda a, b, factor: factor * tanh(a / factor),
}
LAYERS = {Op.EMBED: embed, Op.CONV: conv}
LAYERS |= {
    op: _norm(op, normalize)
    for op, normalize in {Op.RMS_NORM: _over_root_mean_square, Op.CENTRED_NORM: _over_deviation}.items()
}
LAYERS |= {op: _pointwise(op, function) for op, function in _FUNCTIONS.items()}
