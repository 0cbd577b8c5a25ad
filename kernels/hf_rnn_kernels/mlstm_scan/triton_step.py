"""One token of the mLSTM in Triton, for decoding, over the states: C is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rnn_kernels.mlstm_scan.triton_chunks import _heads_and_rows, _jit, _log_sigmoid, _state_tile, _store_state

BK, BV = 32, 64  # a tile of C; rows of it are read whole, as many tiles as there are programs at a time


@_jit
def _step_gates(
    heads, real, i, f, q, k, i_row, i_head, f_row, f_head, q_row, q_head, k_row, k_head, n, m, eps, shares,
    K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program takes a head: n and m after the token, and in `shares` (N * H, 3) what is kept of C, what is added to
    it and what h is divided by. A launch of its own, since the programs of the next all read what is written here."""
    at = tl.program_id(0).to(tl.int64)
    row, head = at // heads, at % heads
    i_t = tl.load(i + row * i_row + head * i_head).to(tl.float32)
    log_f = _log_sigmoid(tl.load(f + row * f_row + head * f_head).to(tl.float32))
    m_before = tl.load(m + at)
    kept, live = log_f + m_before, True
    if real is not None:
        live = tl.load(real + row) != 0
        i_t, kept = tl.where(live, i_t, float("-inf")), tl.where(live, kept, m_before)
    m_t = tl.maximum(kept, i_t)
    # Both at most 1.
    forget, add = tl.exp(kept - m_t), tl.exp(i_t - m_t)
    a = tl.zeros([], tl.float32)
    for begin in range(0, K, BK):
        key = begin + tl.arange(0, BK)
        q_t = tl.load(q + row * q_row + head * q_head + key, (key < K) & live, other=0.0).to(tl.float32)
        k_t = tl.load(k + row * k_row + head * k_head + key, (key < K) & live, other=0.0).to(tl.float32)
        n_t = forget * tl.load(n + at * K + key, key < K, other=0.0) + add * k_t
        tl.store(n + at * K + key, n_t, key < K)
        a += tl.sum(q_t * n_t, 0)
    scale: tl.constexpr = K**-0.5
    tl.store(m + at, m_t)
    tl.store(shares + 3 * at, forget)
    tl.store(shares + 3 * at + 1, add)
    tl.store(shares + 3 * at + 2, tl.maximum(tl.abs(a * scale), tl.exp(-m_t)) + eps)


@_jit
def _step_memory(
    heads, real, q, k, v, q_row, q_head, k_row, k_head, v_row, v_head, C, shares, h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program takes all keys and BV values of a head."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    block, at = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    row, head = at // heads, at % heads
    forget, add, den = tl.load(shares + 3 * at), tl.load(shares + 3 * at + 1), tl.load(shares + 3 * at + 2)
    live = True
    if real is not None:
        live = tl.load(real + row) != 0
    value = block * BV + tl.arange(0, BV)
    v_t = tl.load(v + row * v_row + head * v_head + value, (value < V) & live, other=0.0).to(tl.float32) * add
    num = tl.zeros([BV], tl.float32)
    for begin in range(0, K, BK):
        key = begin + tl.arange(0, BK)
        q_t = tl.load(q + row * q_row + head * q_head + key, (key < K) & live, other=0.0).to(tl.float32)
        k_t = tl.load(k + row * k_row + head * k_head + key, (key < K) & live, other=0.0).to(tl.float32)
        tile = forget * _state_tile(C + at * (K * V), key, value, K, V) + k_t[:, None] * v_t[None, :]
        _store_state(C + at * (K * V), key, value, tile, K, V)
        num += tl.sum(q_t[:, None] * tile, 0)
    scale: tl.constexpr = K**-0.5
    tl.store(h + at * V + value, num * (scale / den), value < V)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    real: Tensor | None,
    eps: float,
) -> Tensor:
    """See `op.decode`."""
    with torch.cuda.device_of(q):
        (sequences, heads, keys), values = q.shape, v.shape[2]
        (i, *i_apart), (f, *f_apart), (q, *q_apart), (k, *k_apart), (v, *v_apart) = (
            _heads_and_rows(x[:, None]) for x in (i, f, q, k, v)
        )
        real = None if real is None else real.to(torch.int8)
        shares = torch.empty(sequences * heads, 3, dtype=torch.float32, device=q.device)
        h = torch.empty(sequences, heads, values, dtype=q.dtype, device=q.device)
        block = min(BK, triton.next_power_of_2(keys))
        _step_gates[(sequences * heads,)](
            heads, real, i, f, q, k, *i_apart, *f_apart, *q_apart, *k_apart, n, m, eps, shares,
            K=keys, BK=block, num_warps=1,
        )  # fmt: skip
        _step_memory[(sequences * heads * triton.cdiv(values, BV),)](
            heads, real, q, k, v, *q_apart, *k_apart, *v_apart, C, shares, h,
            K=keys, V=values, BK=block, BV=BV, num_warps=4,
        )  # fmt: skip
    return h
