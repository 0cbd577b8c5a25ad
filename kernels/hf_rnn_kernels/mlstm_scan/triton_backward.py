"""Gradients of the mLSTM in Triton.

With dnum = dh / den, da = -sign(a) (dh h) / den where |a| decides den, and dW_ij = dnum_i v_j + da_i, chunks again do
everything at once but the walk for dC: `_normalizers`, `_states_back`, `_grad_q`, `_grad_k`, `_grad_v`. States between
chunks are computed again before.

`_grad_gates`: the gradient of log f_t is the sum of everything that flows from before t to t or later: pairs in the
chunk, dW_ij W_ij with j < t <= i; from the state to i >= t; from j < t to the state after; and all through the chunk.
The first would be a difference of large numbers if it held the pairs i = j, so these are kept apart. m has a gradient
as well: h depends on it through eps e^m. It is mu_t, what of it comes from t and later, up to where m came from an
input gate, whose gradient it belongs to; until there to all forget gates on its way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rnn_kernels.mlstm_scan.triton_chunks import (
    _chunk,
    _dot,
    _factor,
    _heads_and_rows,
    _jit,
    _kept,
    _larger_of,
    _last_maximum,
    _last_pair,
    _Launch,
    _live,
    _maxima,
    _pair,
    _place,
    _sequence,
    _state_tile,
    _store_state,
    _tile,
    _tiles,
)


@_jit
def _normalizers(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks,
    h, norms, grad, grad_row, grad_head, eps, d_num, back,
    V: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Writes dnum, and two planes (heads, rows): da, and the gradient of m_t itself, -(dh h) eps / den."""
    head, c = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads
    row, length = _chunk(table, c, time, chunks, L, STEP)
    t = tl.arange(0, L)
    live = _live(mask, row, t, length, STEP)
    to, place = row * heads + head, _place(row, rows, STEP)
    d_num += (place * heads + head) * V
    at = norms + to * 2 + t * (heads * 2 * STEP)
    a, m = tl.load(at, live, other=0.0), tl.load(at + 1, live, other=0.0)
    floor = tl.exp(-m)
    den = tl.maximum(tl.abs(a), floor) + eps
    total = tl.zeros([L], tl.float32)
    for begin in range(0, V, BV):
        value = begin + tl.arange(0, BV)
        dh = _tile(grad + row * grad_row + head * grad_head, t, live, value, grad_row * STEP, V).to(tl.float32)
        total += tl.sum(dh * _tile(h + to * V, t, live, value, heads * V * STEP, V), 1)
        inside = (t < length)[:, None] & (value < V)[None, :]
        tl.store(d_num + t[:, None] * (heads * V) + value[None, :], dh / den[:, None], inside)
    to, plane = back + head * rows + place + t, heads * rows
    d_den = -total / den
    # a has a gradient only where it decides.
    tl.store(to, tl.where(tl.abs(a) > floor, tl.where(a > 0, d_den, -d_den), 0.0), t < length)
    tl.store(to + plane, d_den * eps, t < length)


@_jit
def _states_back(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks, gates, back,
    q, d_num, q_row, q_head, m, last_C, last_n, last_m, dC, dn, mu, first_C, first_n, first_m,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """As `_states`, from the last chunk to the first: gradients of C, n and m at each chunk's end and at the start, of
    m only what comes through m itself."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    parts: tl.constexpr = blocks * ((K + BK - 1) // BK)
    block, key_block = tl.program_id(0) % blocks, (tl.program_id(0) // blocks) % (parts // blocks)
    head = ((tl.program_id(0) // parts) % heads).to(tl.int64)
    sequence = (tl.program_id(0) // parts // heads).to(tl.int64)
    key, value = key_block * BK + tl.arange(0, BK), block * BV + tl.arange(0, BV)
    row, length, c = _sequence(offsets, firsts, sequence, time, chunks, STEP)
    plane = heads * rows
    place = _place(row, rows, STEP)
    gates, back = gates + head * rows + place, back + head * rows + place
    q, q_row, d_num = q + row * q_row + head * q_head, q_row * STEP, d_num + (place * heads + head) * V
    to = sequence * heads + head
    if last_C is None:
        state, keys, mu_t = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32), tl.full([], 0.0, tl.float32)
    else:
        state = _state_tile(last_C + to * (K * V), key, value, K, V)
        keys, mu_t = tl.load(last_n + to * K + key, key < K, other=0.0), tl.load(last_m + to)
    scale: tl.constexpr = K**-0.5
    steps = tl.cdiv(length, L)
    for done in tl.range(0, steps, num_stages=STAGES):
        begin = (steps - 1 - done) * L
        at = (c + steps - 1 - done) * heads + head
        _store_state(dC + at * (K * V), key, value, state.to(dC.dtype.element_ty), K, V)
        left = length - begin
        m_start = tl.load(m + at)
        last, last_low = _last_pair(gates + begin + 2 * plane, left, plane, L)
        M_end, M_end_low = _larger_of(m_start, last, last_low)
        decay = _factor(m_start, 0.0, M_end, M_end_low)
        if block == 0:
            tl.store(dn + at * K + key, keys, key < K)
            if key_block == 0:
                tl.store(mu + at, mu_t)
        state, keys, mu_t = state * decay, keys * decay, tl.where(_kept(m_start, last, last_low), mu_t, 0.0)
        for part in tl.static_range(0, L, BT):
            t = part + tl.arange(0, BT)
            live = _live(mask, row + begin * STEP, t, left, STEP)
            high, low = _pair(gates + begin + 2 * plane, t, left, plane)
            M, M_low = _larger_of(m_start, high, low)
            e = _factor(m_start, 0.0, M, M_low) * scale
            q_t = _tile(q + begin * q_row, t, live, key, q_row, K)
            d_t = _tile(d_num + begin * (heads * V), t, t < left, value, heads * V, V) * e[:, None]
            state = _dot(tl.trans(q_t), d_t, state, DTYPE, PRECISION)
            da = tl.load(back + begin + t, t < left, other=0.0)
            own = tl.load(back + plane + begin + t, t < left, other=0.0)
            keys += tl.sum(q_t * (da * e)[:, None], 0)
            mu_t += tl.sum(tl.where(_kept(m_start, high, low), own, 0.0), 0)
    _store_state(first_C + to * (K * V), key, value, state, K, V)
    if block == 0:
        tl.store(first_n + to * K + key, keys, key < K)
        if key_block == 0:
            tl.store(first_m + to, mu_t)


@_jit
def _grad_q(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks, gates, back,
    q, k, v, d_num, q_row, q_head, k_row, k_head, v_row, v_head, C, n, m, grad_q, flows,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dq_i = s (sum_j dS_ij k_j + e_i (C dnum_i + n da_i)) with dS = dW * D, for BT queries and BK keys; the first
    two of the four planes `flows`: what flows to i from others in the chunk, and from the state before it."""
    tiles: tl.constexpr = L // BT
    parts: tl.constexpr = tiles * ((K + BK - 1) // BK)
    part, task = tl.program_id(0) % parts, tl.program_id(0) // parts
    head, c = (task % heads).to(tl.int64), task // heads
    row, length = _chunk(table, c, time, chunks, L, STEP)
    begin = (part % tiles) * BT
    if begin >= length:
        return
    plane = heads * rows
    place = _place(row, rows, STEP)
    gates, back = gates + head * rows + place, back + head * rows + place
    q, k, v = q + row * q_row + head * q_head, k + row * k_row + head * k_head, v + row * v_row + head * v_head
    q_row, k_row, v_row = q_row * STEP, k_row * STEP, v_row * STEP
    d_num += (place * heads + head) * V
    t, key = begin + tl.arange(0, BT), (part // tiles) * BK + tl.arange(0, BK)
    at = c.to(tl.int64) * heads + head
    m_start = tl.load(m + at)
    M, M_low = _maxima(gates, t, length, plane, m_start)
    live = _live(mask, row, t, length, STEP)
    da = tl.load(back + t, t < length, other=0.0)
    # Pairs i = j apart: `_grad_gates` must not find them in the flows.
    others = tl.zeros([BT, BK], tl.float32)
    diagonal = tl.zeros([BT], tl.float32)
    for other in range(0, begin + BT, BT):
        u = other + tl.arange(0, BT)
        live_u = _live(mask, row, u, length, STEP)
        g, g_low = _pair(gates, u, length, plane)
        dW = tl.zeros([BT, BT], tl.float32) + da[:, None]
        for b in range(0, V, BV):
            value = b + tl.arange(0, BV)
            d_t = _tile(d_num, t, t < length, value, heads * V, V)
            dW = _dot(d_t, tl.trans(_tile(v, u, live_u, value, v_row, V)), dW, DTYPE, PRECISION)
        dS = dW * _factor(g[None, :], g_low[None, :], M[:, None], M_low[:, None])
        diagonal += tl.sum(tl.where(u[None, :] == t[:, None], dS, 0.0), 1)
        dS = tl.where(u[None, :] < t[:, None], dS, 0.0)
        others = _dot(dS, _tile(k, u, live_u, key, k_row, K), others, DTYPE, PRECISION)
    sums = tl.zeros([BT, BK], tl.float32)
    for b in range(0, V, BV):
        value = b + tl.arange(0, BV)
        d_t = _tile(d_num, t, t < length, value, heads * V, V)
        sums = _dot(d_t, tl.trans(_state_tile(C + at * (K * V), key, value, K, V)), sums, DTYPE, PRECISION)
    scale: tl.constexpr = K**-0.5
    e = _factor(m_start, 0.0, M, M_low)
    sums = (sums + da[:, None] * tl.load(n + at * K + key, key < K, other=0.0)[None, :]) * e[:, None]
    q_t = _tile(q, t, live, key, q_row, K)
    to = flows + (part // tiles) * 4 * plane + head * rows + place + t
    tl.store(to, tl.sum(others * q_t, 1) * scale, t < length)
    tl.store(to + plane, tl.sum(sums * q_t, 1) * scale, t < length)
    dq = scale * (others + sums + diagonal[:, None] * _tile(k, t, live, key, k_row, K))
    inside = (t < length)[:, None] & (key < K)[None, :]
    tl.store(grad_q + (row * heads + head) * K + t[:, None] * (heads * K * STEP) + key[None, :], dq, inside)


@_jit
def _grad_k(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks, gates, back,
    q, k, v, d_num, q_row, q_head, k_row, k_head, v_row, v_head, C, n, m, dC, dn, grad_k, flows,
    through,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dk_j = s sum_i dS_ij q_i + w_j (dC v_j + dn), for BT and BK keys; the last two planes of `flows`: what flows
    from j to others and to the state after the chunk, and what j itself reads of it; and, from the first tokens of each
    chunk, what flows `through` the whole."""
    tiles: tl.constexpr = L // BT
    parts: tl.constexpr = tiles * ((K + BK - 1) // BK)
    part, task = tl.program_id(0) % parts, tl.program_id(0) // parts
    head, c = (task % heads).to(tl.int64), task // heads
    row, length = _chunk(table, c, time, chunks, L, STEP)
    begin = (part % tiles) * BT
    if begin >= length:
        return
    plane = heads * rows
    place = _place(row, rows, STEP)
    gates, back = gates + head * rows + place, back + head * rows + place
    q, k, v = q + row * q_row + head * q_head, k + row * k_row + head * k_head, v + row * v_row + head * v_head
    q_row, k_row, v_row = q_row * STEP, k_row * STEP, v_row * STEP
    d_num += (place * heads + head) * V
    t, key = begin + tl.arange(0, BT), (part // tiles) * BK + tl.arange(0, BK)
    at = c.to(tl.int64) * heads + head
    m_start = tl.load(m + at)
    live = _live(mask, row, t, length, STEP)
    g, g_low = _pair(gates, t, length, plane)
    others = tl.zeros([BT, BK], tl.float32)
    diagonal = tl.zeros([BT], tl.float32)
    for other in range(begin, length, BT):
        u = other + tl.arange(0, BT)
        live_u = _live(mask, row, u, length, STEP)
        M, M_low = _maxima(gates, u, length, plane, m_start)
        dW = tl.zeros([BT, BT], tl.float32) + tl.load(back + u, u < length, other=0.0)[None, :]
        for b in range(0, V, BV):
            value = b + tl.arange(0, BV)
            d_u = _tile(d_num, u, u < length, value, heads * V, V)
            dW = _dot(_tile(v, t, live, value, v_row, V), tl.trans(d_u), dW, DTYPE, PRECISION)
        dS = dW * _factor(g[:, None], g_low[:, None], M[None, :], M_low[None, :])
        diagonal += tl.sum(tl.where(u[None, :] == t[:, None], dS, 0.0), 1)
        dS = tl.where(u[None, :] > t[:, None], dS, 0.0)
        others = _dot(dS, _tile(q, u, live_u, key, q_row, K), others, DTYPE, PRECISION)
    M_end, M_end_low = _last_maximum(gates, length, plane, m_start, L)
    w, decay = _factor(g, g_low, M_end, M_end_low), _factor(m_start, 0.0, M_end, M_end_low)
    sums = tl.zeros([BT, BK], tl.float32)
    inner = tl.zeros([BK], tl.float32)
    for b in range(0, V, BV):
        value = b + tl.arange(0, BV)
        dC_t = _state_tile(dC + at * (K * V), key, value, K, V)
        sums = _dot(_tile(v, t, live, value, v_row, V), tl.trans(dC_t), sums, DTYPE, PRECISION)
        # Once a chunk; its other tiles would find the same.
        if begin == 0:
            inner += tl.sum(dC_t.to(tl.float32) * _state_tile(C + at * (K * V), key, value, K, V).to(tl.float32), 1)
    scale: tl.constexpr = K**-0.5
    dn_t = tl.load(dn + at * K + key, key < K, other=0.0)
    sums = (sums + dn_t[None, :]) * w[:, None]
    k_t, q_t = _tile(k, t, live, key, k_row, K).to(tl.float32), _tile(q, t, live, key, q_row, K).to(tl.float32)
    others *= scale
    to = flows + ((part // tiles) * 4 + 2) * plane + head * rows + place + t
    tl.store(to, tl.sum((others + sums) * k_t, 1), t < length)
    tl.store(to + plane, diagonal * tl.sum(q_t * k_t, 1) * scale, t < length)
    if begin == 0:
        inner += dn_t * tl.load(n + at * K + key, key < K, other=0.0)
        tl.store(through + (part // tiles) * (tl.num_programs(0) // parts) + at, tl.sum(inner, 0) * decay)
    dk = others + sums + (diagonal * scale)[:, None] * q_t
    inside = (t < length)[:, None] & (key < K)[None, :]
    tl.store(grad_k + (row * heads + head) * K + t[:, None] * (heads * K * STEP) + key[None, :], dk, inside)


@_jit
def _grad_v(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks, gates, back,
    q, k, d_num, q_row, q_head, k_row, k_head, m, dC, grad_v,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dv_j = sum_i W_ij dnum_i + w_j k_j dC, as `_outputs` the other way round."""
    tiles: tl.constexpr = L // BT
    parts: tl.constexpr = tiles * ((V + BV - 1) // BV)
    part, task = tl.program_id(0) % parts, tl.program_id(0) // parts
    head, c = (task % heads).to(tl.int64), task // heads
    row, length = _chunk(table, c, time, chunks, L, STEP)
    begin = (part % tiles) * BT
    if begin >= length:
        return
    plane = heads * rows
    place = _place(row, rows, STEP)
    gates, back = gates + head * rows + place, back + head * rows + place
    q, k = q + row * q_row + head * q_head, k + row * k_row + head * k_head
    q_row, k_row = q_row * STEP, k_row * STEP
    d_num += (place * heads + head) * V
    t, value = begin + tl.arange(0, BT), (part // tiles) * BV + tl.arange(0, BV)
    at = c.to(tl.int64) * heads + head
    m_start = tl.load(m + at)
    g, g_low = _pair(gates, t, length, plane)
    ks = _tiles(k, t, _live(mask, row, t, length, STEP), k_row, K, BK)
    sums = tl.zeros([BT, BV], tl.float32)
    for b in tl.static_range((K + BK - 1) // BK):
        dC_t = _state_tile(dC + at * (K * V), b * BK + tl.arange(0, BK), value, K, V)
        sums = _dot(ks[b], dC_t, sums, DTYPE, PRECISION)
    M_end, M_end_low = _last_maximum(gates, length, plane, m_start, L)
    sums *= _factor(g, g_low, M_end, M_end_low)[:, None]
    scale: tl.constexpr = K**-0.5
    for other in range(begin, length, BT):
        u = other + tl.arange(0, BT)
        live = _live(mask, row, u, length, STEP)
        M, M_low = _maxima(gates, u, length, plane, m_start)
        S = tl.zeros([BT, BT], tl.float32)
        for b in tl.static_range((K + BK - 1) // BK):
            q_u = _tile(q, u, live, b * BK + tl.arange(0, BK), q_row, K)
            S = tl.dot(ks[b], tl.trans(q_u), S, input_precision=PRECISION)
        D = _factor(g[:, None], g_low[:, None], M[None, :], M_low[None, :])
        W = tl.where(u[None, :] >= t[:, None], S * scale * D, 0.0)
        sums = _dot(W, _tile(d_num, u, u < length, value, heads * V, V), sums, DTYPE, PRECISION)
    inside = (t < length)[:, None] & (value < V)[None, :]
    tl.store(grad_v + (row * heads + head) * V + t[:, None] * (heads * V * STEP) + value[None, :], sums, inside)


@triton.jit
def _back_in_time(keep, total, earlier_keep, earlier_total):
    return keep * earlier_keep, earlier_total + earlier_keep * total


@triton.jit
def _resets(gates, t, length, plane, m_start):
    """Whether m comes from the token's own input gate."""
    high, low = _pair(gates + 2 * plane, t, length, plane)
    g, g_low = _pair(gates, t, length, plane)
    return (g == high) & (g_low == low) & ~_kept(m_start, high, low)


@_jit
def _grad_gates(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks, gates, back,
    f, f_row, f_head, m, mu, flows, through, grad_i, grad_f,
    L: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """From what the other kernels found to flow (`flows`, `through`: PARTS of each) and mu after each chunk."""
    head, c = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads
    row, length = _chunk(table, c, time, chunks, L, STEP)
    plane = heads * rows
    place = head * rows + _place(row, rows, STEP)
    gates, back, flows = gates + place, back + place, flows + place
    at = c.to(tl.int64) * heads + head
    t = tl.arange(0, L)
    inside = t < length
    live = _live(mask, row, t, length, STEP)
    to, from_state = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    out, own = tl.zeros([L], tl.float32), tl.zeros([L], tl.float32)
    flow = tl.zeros([L], tl.float32)
    for part in tl.static_range(PARTS):
        found = flows + part * 4 * plane + t
        to += tl.load(found, inside, other=0.0)
        from_state += tl.load(found + plane, inside, other=0.0)
        out += tl.load(found + 2 * plane, inside, other=0.0)
        own += tl.load(found + 3 * plane, inside, other=0.0)
        flow += tl.load(through + part * tl.num_programs(0) + at)
    m_start = tl.load(m + at)
    mu_t = tl.load(back + plane + t, inside, other=0.0) + tl.where(t == length - 1, tl.load(mu + at), 0.0)
    passes = tl.where(_resets(gates, t + 1, length, plane, m_start), 0.0, 1.0)
    passes, mu_t = tl.associative_scan((passes, mu_t), 0, _back_in_time, reverse=True)
    reset = _resets(gates, t, length, plane, m_start)
    # A running sum of differences: float64, or errors add up along the chunk.
    step = (out - to).to(tl.float64)
    # Up to t, but without t.
    flow += (tl.cumsum(step, 0) - step).to(tl.float32) + tl.cumsum(from_state, 0, reverse=True)
    x = tl.load(f + row * f_row + head * f_head + t * (f_row * STEP), live, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(x))
    not_f = tl.where(x >= 0, e, 1.0) / (1.0 + e)
    token = (row + t * STEP) * heads + head
    tl.store(grad_i + token, tl.where(live, out + own + tl.where(reset, mu_t, 0.0), 0.0), inside)
    tl.store(grad_f + token, tl.where(live, (flow + tl.where(reset, 0.0, mu_t)) * not_f, 0.0), inside)


def scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    h: Tensor,
    norms: Tensor,
    grad: Tensor,
    grad_last: list[Tensor],
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `op.scan_backward`."""
    with torch.cuda.device_of(q):
        launch = _Launch(q, k, v, i, f, states, mask, cu_seqlens, reverse)
        (C, n, m), last = launch.states()
        q, *of_q = launch.q
        back = launch.empty(2, launch.heads, launch.rows)
        d_num = launch.empty(*v.shape, dtype=launch.dtype)
        launch.run(
            _normalizers, launch.chunks, h.contiguous(), norms.contiguous(), *_heads_and_rows(grad), eps, d_num, back,
            V=launch.values, L=launch.plan["L"], BV=64, num_warps=4,
        )  # fmt: skip
        carry = [g.float().contiguous() for g in grad_last] or [None, None, None]
        if grad_last:  # the memory is C e^m: m as it was scaled has what m has beyond C and n
            carry[2] = carry[2] - _inner(carry, last)
        dC, dn = launch.between()
        mu = launch.empty(*m.shape)
        first = [torch.empty_like(x) for x in last]
        launch.walk(_states_back, launch.gates, back, q, d_num, *of_q, m, *carry, dC, dn, mu, *first)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, i, f)]
        _gradients(launch, back, d_num, (C, n, m), (dC, dn, mu), f, grads)
        if states:
            first[2] += _inner(first, launch.first)
    return grads[0], grads[1], grads[2], grads[3], grads[4], first[0], first[1], first[2]


def _inner(grads: list[Tensor], states: list[Tensor]) -> Tensor:
    """What of the gradient of m goes through the memory C e^m and n e^m."""
    return torch.einsum("nhkv,nhkv->nh", grads[0], states[0]) + torch.einsum("nhk,nhk->nh", grads[1], states[1])


def _gradients(launch: _Launch, back: Tensor, d_num: Tensor, states, d_states, f: Tensor, grads: list[Tensor]) -> None:
    """Fills `grads`, those of q, k, v, i and f."""
    (q, *of_q), (k, *of_k), (v, *of_v) = launch.q, launch.k, launch.v
    (C, n, m), (dC, dn, mu) = states, d_states
    parts = launch.blocks("BK")
    flows = launch.empty(parts, 4, launch.heads, launch.rows)
    through = launch.empty(parts, launch.chunks, launch.heads)
    inputs = (launch.gates, back, q, k, v, d_num, *of_q, *of_k, *of_v)
    programs = launch.chunks * launch.blocks("BT")
    constants = launch.tiles("L", "BT", "BK", "BV", "DTYPE", "PRECISION")
    of_keys = constants | launch.plan["of_keys"]
    launch.run(_grad_q, programs * parts, *inputs, C, n, m, grads[0], flows, **of_keys)
    launch.run(_grad_k, programs * parts, *inputs, C, n, m, dC, dn, grads[1], flows, through, **of_keys)
    launch.run(
        _grad_v, programs * launch.blocks("BV"), launch.gates, back, q, k, d_num, *of_q, *of_k, m, dC, grads[2],
        **constants, **launch.plan["of_values"],
    )  # fmt: skip
    f, *of_f = _heads_and_rows(f)
    launch.run(
        _grad_gates, launch.chunks, launch.gates, back, f, *of_f, m, mu, flows, through, grads[3], grads[4],
        L=launch.plan["L"], PARTS=parts, num_warps=1,
    )  # fmt: skip
