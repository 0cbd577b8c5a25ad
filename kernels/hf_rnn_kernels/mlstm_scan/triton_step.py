"""One token of the mLSTM in Triton, for decoding: a single pass over C."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_rnn_kernels.mlstm_scan.triton_chunks import _heads_and_rows, _jit, _log_sigmoid, _state_tile, _store_state

BK, BV = 32, 64  # a tile of C; rows of it are read whole, as many tiles as there are programs at a time


@_jit
def _step(
    heads, i, f, q, k, v, i_row, i_head, f_row, f_head, q_row, q_head, k_row, k_head, v_row, v_head,
    C, n, m, eps, h, new_C, new_n, new_m,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A program takes all keys and BV values of a head; n, which each needs whole, is written by the first."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    block, at = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    row, head = at // heads, at % heads
    i_t = tl.load(i + row * i_row + head * i_head).to(tl.float32)
    log_f = _log_sigmoid(tl.load(f + row * f_row + head * f_head).to(tl.float32))
    m_before = tl.load(m + at)
    m_t = tl.maximum(log_f + m_before, i_t)
    # Both at most 1.
    forget, add = tl.exp(log_f + m_before - m_t), tl.exp(i_t - m_t)
    value = block * BV + tl.arange(0, BV)
    v_t = tl.load(v + row * v_row + head * v_head + value, value < V, other=0.0).to(tl.float32) * add
    num, a = tl.zeros([BV], tl.float32), tl.zeros([], tl.float32)
    for begin in range(0, K, BK):
        key = begin + tl.arange(0, BK)
        q_t = tl.load(q + row * q_row + head * q_head + key, key < K, other=0.0).to(tl.float32)
        k_t = tl.load(k + row * k_row + head * k_head + key, key < K, other=0.0).to(tl.float32)
        n_t = forget * tl.load(n + at * K + key, key < K, other=0.0) + add * k_t
        # C is read and written once; everything else of a token is small.
        tile = forget * _state_tile(C + at * (K * V), key, value, K, V) + k_t[:, None] * v_t[None, :]
        _store_state(new_C + at * (K * V), key, value, tile, K, V)
        num += tl.sum(q_t[:, None] * tile, 0)
        a += tl.sum(q_t * n_t, 0)
        if block == 0:
            tl.store(new_n + at * K + key, n_t, key < K)
    scale: tl.constexpr = K**-0.5
    den = tl.maximum(tl.abs(a * scale), tl.exp(-m_t)) + eps
    tl.store(h + at * V + value, num * (scale / den), value < V)
    if block == 0:
        tl.store(new_m + at, m_t)


def step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k (N, H, K), v (N, H, V) and the gates' pre-activations i, f (N, H) to h (N, H, V), in the dtype of q, and new
    C, n and m in float32; all of a floating dtype, the states as `op.scan` has them."""
    with torch.cuda.device_of(q):
        (sequences, heads, keys), values = q.shape, v.shape[2]
        inputs = [_heads_and_rows(x[:, None]) for x in (i, f, q, k, v)]
        states = [s.float().contiguous() for s in (C, n, m)]
        new = [torch.empty(s.shape, dtype=torch.float32, device=q.device) for s in states]
        h = torch.empty(v.shape, dtype=q.dtype, device=q.device)
        blocks = triton.cdiv(values, BV)
        _step[(sequences * heads * blocks,)](
            heads, *(x for x, *_ in inputs), *(d for _, *apart in inputs for d in apart), *states, eps, h, *new,
            K=keys, V=values, BK=min(BK, triton.next_power_of_2(keys)), BV=BV, num_warps=4,
        )  # fmt: skip
    return h, new[0], new[1], new[2]
