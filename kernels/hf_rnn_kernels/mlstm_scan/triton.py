"""Triton backend for NVIDIA and AMD GPUs: states between chunks by a walk, everything else for all chunks at once.

Forward: `_gates`, `_states` (see `triton_chunks.py`), and `_outputs`, a program of which takes BT queries of one chunk
and a block of the values. Backward: `triton_backward.py`.

The number of sequences, their lengths and the number of heads are run-time arguments on which nothing is specialised.
"""

import torch
import triton.language as tl
from torch import Tensor

from hf_rnn_kernels.mlstm_scan.triton_backward import scan_backward
from hf_rnn_kernels.mlstm_scan.triton_chunks import (
    _chunk,
    _dot,
    _factor,
    _jit,
    _Launch,
    _live,
    _maxima,
    _pair,
    _place,
    _state_tile,
    _tile,
    _tiles,
)
from hf_rnn_kernels.mlstm_scan.triton_step import decode

__all__ = ["decode", "scan", "scan_backward"]


@_jit
def _outputs(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks, gates,
    q, k, v, q_row, q_head, k_row, k_head, v_row, v_head, C, n, m, eps, h, norms,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """h_i = num_i / den_i with num_i = s (e_i q_i C + sum_j (q_i k_j) D_ij v_j), s = K^-0.5, and the normaliser
    a_i = s (e_i q_i n + sum_j (q_i k_j) D_ij); den_i = max(|a_i|, exp(-m_i)) + eps. `norms` holds a and m."""
    tiles: tl.constexpr = L // BT
    parts: tl.constexpr = tiles * ((V + BV - 1) // BV)
    part, task = tl.program_id(0) % parts, tl.program_id(0) // parts
    head, c = (task % heads).to(tl.int64), task // heads
    row, length = _chunk(table, c, time, chunks, L, STEP)
    begin = (part % tiles) * BT
    # A chunk shorter than L leaves tiles with nothing to do.
    if begin >= length:
        return
    gates, plane = gates + head * rows + _place(row, rows, STEP), heads * rows
    q, k, v = q + row * q_row + head * q_head, k + row * k_row + head * k_head, v + row * v_row + head * v_head
    q_row, k_row, v_row = q_row * STEP, k_row * STEP, v_row * STEP
    t, value = begin + tl.arange(0, BT), (part // tiles) * BV + tl.arange(0, BV)
    at = c.to(tl.int64) * heads + head
    m_start = tl.load(m + at)
    M, M_low = _maxima(gates, t, length, plane, m_start)
    qs = _tiles(q, t, _live(mask, row, t, length, STEP), q_row, K, BK)
    sums, a = tl.zeros([BT, BV], tl.float32), tl.zeros([BT], tl.float32)
    for b in tl.static_range((K + BK - 1) // BK):
        key = b * BK + tl.arange(0, BK)
        sums = _dot(qs[b], _state_tile(C + at * (K * V), key, value, K, V), sums, DTYPE, PRECISION)
        a += tl.sum(qs[b] * tl.load(n + at * K + key, key < K, other=0.0)[None, :], 1)
    e = _factor(m_start, 0.0, M, M_low)
    sums, a = sums * e[:, None], a * e
    # Up to the diagonal; beyond it W is zero.
    for other in range(0, begin + BT, BT):
        u = other + tl.arange(0, BT)
        live = _live(mask, row, u, length, STEP)
        g, g_low = _pair(gates, u, length, plane)
        S = tl.zeros([BT, BT], tl.float32)
        for b in tl.static_range((K + BK - 1) // BK):
            k_u = _tile(k, u, live, b * BK + tl.arange(0, BK), k_row, K)
            S = tl.dot(qs[b], tl.trans(k_u), S, input_precision=PRECISION)
        D = _factor(g[None, :], g_low[None, :], M[:, None], M_low[:, None])
        # Before the product: beyond the diagonal D may be above 1, and infinite.
        W = tl.where(u[None, :] <= t[:, None], S * D, 0.0)
        a += tl.sum(W, 1)
        sums = _dot(W, _tile(v, u, live, value, v_row, V), sums, DTYPE, PRECISION)
    scale: tl.constexpr = K**-0.5
    F = tl.load(gates + 4 * plane + t, t < length, other=0.0)
    local = tl.load(gates + 5 * plane + t, t < length, other=0.0)
    m_t = tl.maximum(F + m_start, local)
    a *= scale
    h_t = sums * (scale / (tl.maximum(tl.abs(a), tl.exp(-m_t)) + eps))[:, None]
    inside = (t < length)[:, None] & (value < V)[None, :]
    tl.store(h + (row * heads + head) * V + t[:, None] * (heads * V * STEP) + value[None, :], h_t, inside)
    if norms is not None and part < tiles:
        to = norms + ((row + t * STEP) * heads + head) * 2
        tl.store(to, a, t < length)
        tl.store(to + 1, m_t, t < length)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    training: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `op.scan`."""
    with torch.cuda.device_of(q):
        launch = _Launch(q, k, v, i, f, states, mask, cu_seqlens, reverse)
        every, last = launch.states()
        h = launch.empty(*v.shape, dtype=q.dtype)
        norms = launch.empty(*i.shape, 2 * training)
        inputs = [x for x, *_ in (launch.q, launch.k, launch.v)]
        apart = [d for _, *both in (launch.q, launch.k, launch.v) for d in both]
        launch.run(
            _outputs, launch.chunks * launch.blocks("BT") * launch.blocks("BV"), launch.gates, *inputs, *apart, *every,
            eps, h, norms if training else None,
            **launch.tiles("L", "BT", "BK", "BV", "DTYPE", "PRECISION"), **launch.plan["of_values"],
        )  # fmt: skip
    return h, norms, last[0], last[1], last[2]
