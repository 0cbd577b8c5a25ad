"""The cells: pre-activations and the state to h; the state moves on. Equations: `recurrent_scan`, `gated_scan` and
`mlstm_scan`."""

import numpy as np
from numba import carray

from hf_rnn_kernels.fused_step.cpu_operands import ALL, floats_at, operand
from hf_rnn_kernels.fused_step.program import Op
from hf_rnn_kernels.vector_math import F32, HALF, ONE, U, decay, dot, exp, inline, log_sigmoid, sigmoids, tanh


def lstm(line, factors, bases, rows, part, parts):
    size, heads = U(line[1]), U(line[2])
    gates, x_apart = operand(line, 0, bases)
    recurrent, r_apart = operand(line, 1, bases)
    h, h_apart = operand(line, 2, bases)
    state, s_apart = operand(line, 3, bases)
    c, c_apart = operand(line, 4, bases)
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


def gru(line, factors, bases, rows, part, parts):
    size, heads = U(line[1]), U(line[2])
    gates, x_apart = operand(line, 0, bases)
    recurrent, r_apart = operand(line, 1, bases)
    h, h_apart = operand(line, 2, bases)
    state, s_apart = operand(line, 3, bases)
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


def slstm(line, factors, bases, rows, part, parts):
    size, heads = U(line[1]), U(line[2])
    gates, x_apart = operand(line, 0, bases)
    recurrent, r_apart = operand(line, 1, bases)
    h, h_apart = operand(line, 2, bases)
    state, s_apart = operand(line, 3, bases)
    cells, _ = operand(line, 4, bases)
    normalizers, _ = operand(line, 5, bases)
    tops, _ = operand(line, 6, bases)
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


def min_gru(line, factors, bases, rows, part, parts):
    size, use_g = U(line[1]), line[2]
    h, h_apart = operand(line, 0, bases)
    state, s_apart = operand(line, 1, bases)
    gate, g_apart = operand(line, 2, bases)
    candidate, x_apart = operand(line, 3, bases)
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


def min_lstm(line, factors, bases, rows, part, parts):
    size, use_g, normalize = U(line[1]), line[2], line[3]
    h, h_apart = operand(line, 0, bases)
    state, s_apart = operand(line, 1, bases)
    forget, f_apart = operand(line, 2, bases)
    input_, i_apart = operand(line, 3, bases)
    candidate, x_apart = operand(line, 4, bases)
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


def mlstm(line, factors, bases, rows, part, parts):
    """q is divided by sqrt(keys) here; of `gates` the first halves are i."""
    heads, keys, values, eps = U(line[1]), U(line[2]), U(line[3]), factors[0]
    q, q_apart = operand(line, 0, bases)
    key, k_apart = operand(line, 1, bases)
    v, v_apart = operand(line, 2, bases)
    gates, g_apart = operand(line, 3, bases)
    h, h_apart = operand(line, 4, bases)
    memory, c_apart = operand(line, 5, bases)
    normalizer, n_apart = operand(line, 6, bases)
    tops = carray(floats_at(bases[line[4]] + line[5]), ALL)
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
        divisor = max(abs(dot(keys, q, q0, normalizer, n0) * root), exp(-top)) + eps
        for b in range(values):
            h[h0 + b] = F32(0)
        for a in range(keys):
            at, written, query = c0 + a * values, add * key[k0 + a], q[q0 + a] * root / divisor
            for b in range(values):
                memory[at + b] = forget * memory[at + b] + written * v[v0 + b]
            for b in range(values):
                h[h0 + b] += query * memory[at + b]


CELLS = {
    Op.LSTM: lstm,
    Op.GRU: gru,
    Op.SLSTM: slstm,
    Op.MIN_GRU: min_gru,
    Op.MIN_LSTM: min_lstm,
    Op.MLSTM: mlstm,
}
