"""The compiled loop that runs a program: one call a token.

An address is a space's own plus an offset. Each share of the rows has scratch memory of its own; of a state tensor its
rows begin at the share's first.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from hf_rnn_kernels.cpu_cache import loop
from hf_rnn_kernels.fused_step.program import FIRST, SCRATCH, Op, Pointwise
from hf_rnn_kernels.matrix_product import LANES
from hf_rnn_kernels.packed_linear.cpu import FEW, TILE, packed_dot, panels_of, times_panels, unpack_row
from hf_rnn_kernels.vector_math import F32, FAST, HALF, ONE, U, decay, exp, inline, log_sigmoid, parallel, row
from hf_rnn_kernels.vector_math import sigmoids, tanh

_sums = njit(fastmath=FAST | {"reassoc"}, error_model="numpy")  # sums in any order, so that they vectorise
_compiled = loop(fastmath=FAST, error_model="numpy")
_EMBED, _LINEAR, _NORM, _POINTWISE = int(Op.EMBED), int(Op.LINEAR), int(Op.NORM), int(Op.POINTWISE)
_CONV, _LSTM, _GRU, _SLSTM = int(Op.CONV), int(Op.LSTM), int(Op.GRU), int(Op.SLSTM)
_MIN_GRU, _MIN_LSTM, _MLSTM = int(Op.MIN_GRU), int(Op.MIN_LSTM), int(Op.MLSTM)
_COPY, _ADD, _MULTIPLY, _SILU = (int(f) for f in (Pointwise.COPY, Pointwise.ADD, Pointwise.MULTIPLY, Pointwise.SILU))
_GELU, _SILU_MULTIPLY = int(Pointwise.GELU), int(Pointwise.SILU_MULTIPLY)
_GELU_MULTIPLY, _SIGMOID_MULTIPLY = int(Pointwise.GELU_MULTIPLY), int(Pointwise.SIGMOID_MULTIPLY)
_SCRATCH, _FIRST = int(SCRATCH), int(FIRST)
_FLOAT, _ALL = U(32), 2**40  # bits of a weight that is not packed; numbers behind an address: as many as one asks for


def _pointer_to(kind, llvm):
    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], llvm.as_pointer())

        return types.CPointer(kind)(types.int64), generate

    return pointer


_float_pointer, _byte_pointer = _pointer_to(types.float32, ir.FloatType()), _pointer_to(types.uint8, ir.IntType(8))
_long_pointer = _pointer_to(types.int64, ir.IntType(64))


@njit
def _operand(code, n, operand, bases, first):
    """An operand's numbers from the share's first row on, and how far apart rows are."""
    at = _FIRST + 3 * operand
    space, address, stride = code[n, at], code[n, at + 1], code[n, at + 2]
    address += bases[space]
    if space != _SCRATCH:
        address += 4 * first * stride
    return carray(_float_pointer(address), _ALL), U(stride)


@_sums
def _four_dots(size, w, w0, x, x0):
    """Four rows of a matrix times a vector, which is read once."""
    a, b, c, d = F32(0), F32(0), F32(0), F32(0)
    for i in range(size):
        a += w[w0 + i] * x[x0 + i]
        b += w[w0 + size + i] * x[x0 + i]
        c += w[w0 + U(2) * size + i] * x[x0 + i]
        d += w[w0 + U(3) * size + i] * x[x0 + i]
    return a, b, c, d


@_sums
def _dot(size, w, w0, x, x0):
    total = F32(0)
    for i in range(size):
        total += w[w0 + i] * x[x0 + i]
    return total


@row
def _few_rows(inputs, w, w0, o, end, x, x0, x_apart, y, y0, y_apart, rows):
    """y += rows `o` to `end` of a matrix times each of a few rows of x; what was read of the matrix is in the cache."""
    while o + U(4) <= end:
        for r in range(rows):
            a, b, c, d = _four_dots(inputs, w, w0 + o * inputs, x, x0 + r * x_apart)
            to = y0 + r * y_apart + o
            y[to] += a
            y[to + U(1)] += b
            y[to + U(2)] += c
            y[to + U(3)] += d
        o += U(4)
    while o < end:
        for r in range(rows):
            y[y0 + r * y_apart + o] += _dot(inputs, w, w0 + o * inputs, x, x0 + r * x_apart)
        o += U(1)


@row
def _many_rows(bits, inputs, group, w, packed, scale, above, o, end, x, x0, x_apart, y, y0, y_apart, rows):
    """The same for many rows of x: a tile of the matrix stays in the cache while they pass by. `above`: rows of the
    matrix that are other groups'."""
    laid, panels = panels_of(rows, inputs, x, x0, x_apart)
    wide = panels * U(LANES)
    block = np.empty(TILE * wide, np.float32)
    plain = np.empty(U(0) if bits == _FLOAT else TILE * inputs, np.float32)
    while o < end:
        count = min(TILE, end - o)
        if bits == _FLOAT:
            times_panels(w, (above + o) * inputs, count, inputs, laid, panels, block)
        else:
            for k in range(count):
                unpack_row(bits, inputs, group, packed, scale, above + o + k, plain, k * inputs)
            times_panels(plain, U(0), count, inputs, laid, panels, block)
        for r in range(rows):
            for k in range(count):
                y[y0 + r * y_apart + o + k] += block[k * wide + r]
        o += count


@row
def _linear(code, n, bases, first, rows, part, parts):
    """y = W x + b, each of its groups for itself, for one part of the rows of W, in float32 or packed."""
    bits, groups, outputs, inputs, group = U(code[n, 1]), U(code[n, 2]), U(code[n, 3]), U(code[n, 4]), U(code[n, 5])
    x, x_apart = _operand(code, n, 0, bases, first)
    w, _ = _operand(code, n, 1, bases, first)
    packed = carray(_byte_pointer(code[n, _FIRST + 4]), _ALL)
    bias, _ = _operand(code, n, 2, bases, first)
    y, y_apart = _operand(code, n, 3, bases, first)
    scale, _ = _operand(code, n, 4, bases, first)
    o, end = outputs * part // parts // U(4) * U(4), outputs * (part + U(1)) // parts // U(4) * U(4)
    if part + U(1) == parts:
        end = outputs
    for k in range(groups):
        x0, y0, w0 = k * inputs, k * outputs, k * outputs * inputs  # y0: also rows of the matrix above this group's
        for r in range(rows):
            for d in range(o, end):
                y[r * y_apart + y0 + d] = F32(0) if code[n, _FIRST + 7] == 0 else bias[y0 + d]
        if rows > FEW:
            _many_rows(
                bits, inputs, group, w, packed, scale, y0, o, end, x, x0, x_apart, y, y0, y_apart, rows
            )
        elif bits == _FLOAT:
            _few_rows(inputs, w, w0, o, end, x, x0, x_apart, y, y0, y_apart, rows)
        else:
            for d in range(o, end):
                for r in range(rows):
                    y[r * y_apart + y0 + d] += packed_dot(
                        bits, inputs, group, packed, scale, y0 + d, x, r * x_apart + x0
                    )


@_sums
def _norm(size, heads, centred, x, x0, eps, y, y0):
    """Each head over the root of its mean square, or less its mean over its deviation."""
    for k in range(heads):
        at, to, mean, square = x0 + k * size, y0 + k * size, F32(0), F32(0)
        if centred:
            for d in range(size):
                mean += x[at + d]
            mean /= F32(size)
        for d in range(size):
            square += (x[at + d] - mean) * (x[at + d] - mean)
        scale = ONE / np.sqrt(square / F32(size) + eps)
        for d in range(size):
            y[to + d] = (x[at + d] - mean) * scale


@inline
def _gelu(x):
    """x Phi(x), erfc by Abramowitz and Stegun's 7.1.26, to 1.5e-7."""
    z = abs(x) * F32(0.7071067811865476)
    t = ONE / (ONE + F32(0.3275911) * z)
    p = (((F32(1.061405429) * t - F32(1.453152027)) * t + F32(1.421413741)) * t - F32(0.284496736)) * t
    tail = HALF * x * ((p + F32(0.254829592)) * t * exp(-z * z))
    return x - tail if x > F32(0) else tail


@row
def _pointwise(function, size, a, a0, b, b0, y, y0, cap):
    if function == _COPY:
        for d in range(size):
            y[y0 + d] = a[a0 + d]
    elif function == _ADD:
        for d in range(size):
            y[y0 + d] = a[a0 + d] + b[b0 + d]
    elif function == _MULTIPLY:
        for d in range(size):
            y[y0 + d] = a[a0 + d] * b[b0 + d]
    elif function == _SILU:
        for d in range(size):
            y[y0 + d] = a[a0 + d] * sigmoids(a[a0 + d])[1]
    elif function == _GELU:
        for d in range(size):
            y[y0 + d] = _gelu(a[a0 + d])
    elif function == _SILU_MULTIPLY:
        for d in range(size):
            y[y0 + d] = a[a0 + d] * b[b0 + d] * sigmoids(b[b0 + d])[1]
    elif function == _GELU_MULTIPLY:
        for d in range(size):
            y[y0 + d] = a[a0 + d] * _gelu(b[b0 + d])
    elif function == _SIGMOID_MULTIPLY:
        for d in range(size):
            y[y0 + d] = a[a0 + d] * sigmoids(b[b0 + d])[1]
    else:
        for d in range(size):
            y[y0 + d] = cap * tanh(a[a0 + d] / cap)


@row
def _conv(size, taps, x, x0, weight, bias, state, s0, y, y0):
    """The inputs before x, oldest first, move on by one."""
    history = taps - U(1)
    for d in range(size):
        y[y0 + d] = bias[d] + weight[d * taps + history] * x[x0 + d]
    for j in range(history):
        for d in range(size):
            y[y0 + d] += weight[d * taps + j] * state[s0 + j * size + d]
        if j > U(0):
            for d in range(size):
                state[s0 + (j - U(1)) * size + d] = state[s0 + j * size + d]
    if history > U(0):
        for d in range(size):
            state[s0 + (history - U(1)) * size + d] = x[x0 + d]


@row
def _lstm(size, x, x0, r, r0, h, h0, state, s0, c, c0):
    for p in range(size):
        keep = sigmoids(x[x0 + size + p] + r[r0 + size + p])[1]
        add = sigmoids(x[x0 + p] + r[r0 + p])[1] * tanh(x[x0 + U(2) * size + p] + r[r0 + U(2) * size + p])
        c[c0 + p] = keep * c[c0 + p] + add
    for p in range(size):
        state[s0 + p] = sigmoids(x[x0 + U(3) * size + p] + r[r0 + U(3) * size + p])[1] * tanh(c[c0 + p])
    for p in range(size):
        h[h0 + p] = state[s0 + p]


@row
def _gru(size, x, x0, r, r0, h, h0, state, s0):
    for p in range(size):
        reset = sigmoids(x[x0 + p] + r[r0 + p])[1]
        z = sigmoids(x[x0 + size + p] + r[r0 + size + p])[1]
        new = tanh(x[x0 + U(2) * size + p] + reset * r[r0 + U(2) * size + p])
        state[s0 + p] = new + z * (state[s0 + p] - new)
    for p in range(size):
        h[h0 + p] = state[s0 + p]


@row
def _slstm(size, x, x0, r, r0, h, h0, state, s0, c, c0, normalizer, n0, top, m0):
    for p in range(size):
        i = x[x0 + p] + r[r0 + p]
        z = tanh(x[x0 + U(2) * size + p] + r[r0 + U(2) * size + p])
        o = sigmoids(x[x0 + U(3) * size + p] + r[r0 + U(3) * size + p])[1]
        kept = log_sigmoid(x[x0 + size + p] + r[r0 + size + p])[0] + top[m0 + p]
        empty = normalizer[n0 + p] == F32(0)
        m = i if empty or i > kept else kept
        add, keep = exp(i - m), F32(0) if empty else exp(kept - m)
        top[m0 + p] = m
        c[c0 + p] = keep * c[c0 + p] + add * z
        normalizer[n0 + p] = keep * normalizer[n0 + p] + add
        state[s0 + p] = o * c[c0 + p] / normalizer[n0 + p]
    for p in range(size):
        h[h0 + p] = state[s0 + p]


@inline
def _lerp(h, goal, share, rest):
    """rest * h + share * goal, free of cancellation for gates near 0 and near 1."""
    return h + share * (goal - h) if share < HALF else goal - rest * (goal - h)


@row
def _min_gru(size, use_g, h, h0, state, s0, gate, g0, candidate, x0):
    for p in range(size):
        rest, share = sigmoids(gate[g0 + p])
        x = candidate[x0 + p]
        goal = x
        if use_g:
            goal = x + HALF if x >= F32(0) else sigmoids(x)[1]
        state[s0 + p] = _lerp(state[s0 + p], goal, share, rest)
    for p in range(size):
        h[h0 + p] = state[s0 + p]


@row
def _min_lstm(size, use_g, normalize, h, h0, state, s0, forget, f0, input_, i0, candidate, x0):
    for p in range(size):
        x, f, i = candidate[x0 + p], forget[f0 + p], input_[i0 + p]
        goal = x
        if use_g:
            goal = x + HALF if x >= F32(0) else sigmoids(x)[1]
        if normalize:
            rest, share = sigmoids(log_sigmoid(i)[0] - log_sigmoid(f)[0])
            state[s0 + p] = _lerp(state[s0 + p], goal, share, rest)
        else:
            drop, keep = sigmoids(f)
            state[s0 + p] = decay(keep, drop, state[s0 + p]) + sigmoids(i)[1] * goal
    for p in range(size):
        h[h0 + p] = state[s0 + p]


@row
def _mlstm(keys, values, q, q0, k, k0, v, v0, i, f, h, h0, memory, c0, normalizer, n0, m, eps):
    """One head: q is divided by sqrt(keys) here; returns the new m."""
    kept = log_sigmoid(f)[0] + m
    top = max(kept, i)
    forget, add, scale = exp(kept - top), exp(i - top), ONE / np.sqrt(F32(keys))
    for a in range(keys):
        normalizer[n0 + a] = forget * normalizer[n0 + a] + add * k[k0 + a]
    divisor = max(abs(_dot(keys, q, q0, normalizer, n0) * scale), exp(-top)) + eps
    for b in range(values):
        h[h0 + b] = F32(0)
    for a in range(keys):
        at, key, query = c0 + a * values, add * k[k0 + a], q[q0 + a] * scale / divisor
        for b in range(values):
            memory[at + b] = forget * memory[at + b] + key * v[v0 + b]
        for b in range(values):
            h[h0 + b] += query * memory[at + b]
    return top


@row
def _instruction(code, factors, n, bases, first, rows):
    """Any but a product."""
    op, size, option = code[n, 0], U(code[n, 1]), U(code[n, 2])
    a, a_apart = _operand(code, n, 0, bases, first)
    b, b_apart = _operand(code, n, 1, bases, first)
    c, c_apart = _operand(code, n, 2, bases, first)
    d, d_apart = _operand(code, n, 3, bases, first)
    e, e_apart = _operand(code, n, 4, bases, first)
    f, f_apart = _operand(code, n, 5, bases, first)
    g, g_apart = _operand(code, n, 6, bases, first)
    for r in range(rows):
        at_a, at_b, at_c, at_d = r * a_apart, r * b_apart, r * c_apart, r * d_apart
        at_e, at_f, at_g = r * e_apart, r * f_apart, r * g_apart
        if op == _EMBED:
            ids = carray(_long_pointer(bases[code[n, _FIRST]]), _ALL)
            token = U(ids[U(first) + r])
            for k in range(size):
                c[at_c + k] = b[token * size + k]
        elif op == _NORM:
            _norm(size, option, code[n, 3], a, at_a, factors[n, 0], c, at_c)
            if code[n, 4]:
                for k in range(size * option):
                    c[at_c + k] *= b[k]
        elif op == _POINTWISE:
            _pointwise(code[n, 2], size, a, at_a, b, at_b, c, at_c, factors[n, 0])
        elif op == _CONV:
            _conv(size, option, a, at_a, b, c, d, at_d, e, at_e)
        elif op == _LSTM:
            for k in range(option):
                x, p = U(4) * k * size, k * size
                _lstm(size, a, at_a + x, b, at_b + x, c, at_c + p, d, at_d + p, e, at_e + p)
        elif op == _GRU:
            for k in range(option):
                x, p = U(3) * k * size, k * size
                _gru(size, a, at_a + x, b, at_b + x, c, at_c + p, d, at_d + p)
        elif op == _SLSTM:
            for k in range(option):
                x, p = U(4) * k * size, k * size
                _slstm(
                    size, a, at_a + x, b, at_b + x, c, at_c + p, d, at_d + p, e, at_e + p, f, at_f + p, g, at_g + p
                )
        elif op == _MIN_GRU:
            _min_gru(size, code[n, 2], a, at_a, b, at_b, c, at_c, d, at_d)
        elif op == _MIN_LSTM:
            _min_lstm(size, code[n, 2], code[n, 3], a, at_a, b, at_b, c, at_c, d, at_d, e, at_e)
        elif op == _MLSTM:  # e: i and then f of all heads; f, g and the state behind: C, n, m
            heads, keys, values = size, option, U(code[n, 3])
            m = carray(_float_pointer(bases[code[n, 4]]), _ALL)
            for k in range(heads):
                place = (U(first) + r) * heads + k
                m[place] = _mlstm(
                    keys, values, a, at_a + k * keys, b, at_b + k * keys, c, at_c + k * values, d[at_d + k],
                    d[at_d + heads + k], e, at_e + k * values, f, at_f + k * keys * values, g, at_g + k * keys,
                    m[place], factors[n, 0],
                )  # fmt: skip


@row
def _program(code, factors, bases, first, rows):
    for n in range(code.shape[0]):
        if code[n, 0] == _LINEAR:
            _linear(code, n, bases, first, rows, U(0), U(1))
        else:
            _instruction(code, factors, n, bases, first, rows)


@_compiled
def one_thread(code, factors, bases, rows):
    """All rows, one instruction after another."""
    _program(code, factors, bases, 0, U(rows))


@parallel
def rows_apart(code, factors, bases, rows, shares, scratch_bytes):
    """Each thread has some of the rows for itself and waits for no other; `code` is bound to the rows of one."""
    each = (rows + shares - 1) // shares
    for share in prange(shares):
        first = share * each
        own = bases.copy()
        own[_SCRATCH] += share * scratch_bytes
        if first < rows:
            _program(code, factors, own, first, U(min(each, rows - first)))


@parallel
def weights_apart(code, factors, bases, rows, parts):
    """Each thread has some of the outputs of every product."""
    for n in range(code.shape[0]):
        if code[n, 0] == _LINEAR:
            for part in prange(parts):
                _linear(code, n, bases, 0, U(rows), U(part), U(parts))
        else:
            _instruction(code, factors, n, bases, 0, U(rows))
