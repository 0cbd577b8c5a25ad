"""CPU backend: small matrix products over chunks of tokens, compiled.

Inside a chunk of L tokens that starts from the states C, n and m, with F the running sum of log sigmoid(f) and
g_j = i_j - F_j, the stabiliser is m_t = F_t + M_t for M_t = max(m, g_1, ..., g_t), and token j weighs
D_tj = e^(g_j - M_t) at t, the chunk's first state e_t = e^(m - M_t): at most 1, all of them. So

    W = (Q K^T) * D,  a = e (Q n) + W 1,  h = (e (Q C) + W V) / (max(|a|, e^-m_t) + eps),  Q divided by sqrt(K).

Forward, `_states` walks the chunks of a (sequence, head) and keeps the states at their starts, `_outputs` then takes
each chunk for itself. Backward (`cpu_backward.py`), `_states` again, `adjoints` walks from the last chunk to the first,
and `gradients` takes each chunk for itself. Adjoints of C and n are kept times e^m at the same place: their weights are
those above.

Tensors come as flat arrays, a token's heads `apart` from the next token's. A chunk's rows are its tokens as they are
read, which may be backwards in memory. F, g and M are sums of up to L terms whose differences count, m at chunk starts
is one of them: float64.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import empty, flat, rows_apart
from hf_rnn_kernels.matrix_product import LANES, product
from hf_rnn_kernels.mlstm_scan import reference
from hf_rnn_kernels.mlstm_scan.cpu_backward import adjoints, gradients
from hf_rnn_kernels.mlstm_scan.cpu_chunks import (
    ROWS,
    Chunks,
    Sizes,
    dot,
    gates,
    load,
    scale_rows,
    sum_of,
    transpose,
    triangle,
    turned,
    weight,
)
from hf_rnn_kernels.mlstm_scan.reference import initial_states
from hf_rnn_kernels.threads import run, worthwhile
from hf_rnn_kernels.vector_math import F32, ONE, U, exp, parallel, row

_U0, _U1, _LANES = U(0), U(1), U(LANES)
_ZERO = F32(0)
FORGOTTEN = -1e4  # e^-10000 is zero, and a sum with it still has the digits of what comes after; with -inf it has none


@row
def _next_state(rows, keys, values, k, v, g, top, m, C_here, n_here, scratch, weights):
    """C and n at the end of a chunk in place of those at its start, each an array and where it begins in it."""
    (C, c0), (n, n0) = C_here, n_here
    last = top[rows - _U1]
    keep = weight(m - last)
    for r in range(rows):
        weights[r] = weight(g[r] - last)
    scale_rows(rows, values, weights, v, scratch)
    for d in range(keys * values):
        C[c0 + d] *= keep
    places = (c0, values)
    product(k, (_U0, _U1, keys), scratch, (_U0, _LANES, values), C, places, C, places, keys, rows, values // _LANES)
    for d in range(keys):
        n[n0 + d] *= keep
    for r in range(rows):
        for d in range(keys):
            n[n0 + d] += weights[r] * k[r * keys + d]


@parallel
def _states(sizes, chunks, mask, inputs, i_and_log_f, states, states_at):
    """C, n, m from the first states of each sequence to its last; `states_at` get those of chunk starts."""
    chunk_size, heads, K, V, reverse = sizes
    first_chunk, start, count = chunks
    (k, k_apart), (v, v_apart) = inputs
    (C, n, m), (C_at, n_at, m_at) = states, states_at
    keys, values = (K + _LANES - _U1) // _LANES * _LANES, (V + _LANES - _U1) // _LANES * _LANES
    for task in prange(U(first_chunk.size - 1) * heads):
        sequence, head = U(task) // heads, U(task) % heads
        ks, vs = np.empty(chunk_size * keys, np.float32), np.empty(chunk_size * values, np.float32)
        scratch, weights = np.empty(chunk_size * values, np.float32), np.empty(chunk_size, np.float32)
        g, top, total = np.empty(chunk_size), np.empty(chunk_size), np.empty(chunk_size)
        # The last states are the running ones.
        c0, n0, m0 = U(task) * keys * values, U(task) * keys, U(task)
        for chunk in range(first_chunk[sequence], first_chunk[sequence + _U1]):
            at, token, rows = chunk * heads + head, start[chunk], count[chunk]
            turn = reverse * (rows - _U1)
            for d in range(keys * values):
                C_at[at * keys * values + d] = C[c0 + d]
            for d in range(keys):
                n_at[at * keys + d] = n[n0 + d]
            m_at[at] = m[m0]
            load(rows, K, keys, k, (head * K, k_apart), mask, (token, turn), ONE, ks)
            load(rows, V, values, v, (head * V, v_apart), mask, (token, turn), ONE, vs)
            gates(rows, i_and_log_f, token * heads + head, heads, turn, m[m0], g, top, total)
            _next_state(rows, keys, values, ks, vs, g, top, m[m0], (C, c0), (n, n0), scratch, weights)
            m[m0] = total[rows - _U1] + top[rows - _U1]


@row
def _decays(r, below, g, top, w, w0):
    """Row r of Q K^T to that of W: times D up to the diagonal, zero beyond it; `below` entries."""
    largest = top[r]
    # Whole blocks of 16 and a select at the diagonal: 3.1 microseconds. Rows of 1 to 64 entries took 4.4, most of it in
    # the remainder of a loop that handles 64 at a time.
    for j in range(below):
        decay = weight(g[j] - largest)
        w[w0 + j] *= decay if j <= r else _ZERO


@parallel
def _outputs(sizes, chunks, mask, inputs, i_and_log_f, states_at, eps, h, norms):
    chunk_size, heads, K, V, reverse = sizes
    _, start, count = chunks
    (q, q_apart), (k, k_apart), (v, v_apart) = inputs
    C_at, n_at, m_at = states_at
    scale = ONE / np.sqrt(F32(K))
    keys, values = (K + _LANES - _U1) // _LANES * _LANES, (V + _LANES - _U1) // _LANES * _LANES
    side = chunk_size
    for task in prange(U(start.size) * heads):
        chunk, head, at = U(task) // heads, U(task) % heads, U(task)
        token, rows = start[chunk], count[chunk]
        turn = reverse * (rows - _U1)
        qs, ks = np.empty(chunk_size * keys, np.float32), np.empty(chunk_size * keys, np.float32)
        panels, vs = np.empty(side * keys, np.float32), np.empty(chunk_size * values, np.float32)
        out, w = np.empty(chunk_size * values, np.float32), np.empty(chunk_size * side, np.float32)
        # A row that every row starts from: strides of zero.
        nothing = np.zeros(max(side, values), np.float32)
        g, top, total = np.empty(chunk_size), np.empty(chunk_size), np.empty(chunk_size)
        load(rows, K, keys, q, (head * K, q_apart), mask, (token, turn), scale, qs)
        load(rows, K, keys, k, (head * K, k_apart), mask, (token, turn), ONE, ks)
        load(rows, V, values, v, (head * V, v_apart), mask, (token, turn), ONE, vs)
        gates(rows, i_and_log_f, token * heads + head, heads, turn, m_at[at], g, top, total)
        transpose(rows, keys, keys, ks, _U0, panels)
        triangle(rows, keys, side, qs, panels, nothing, w)
        product(
            qs, (_U0, keys, _U1), C_at, (at * keys * values, _LANES, values), nothing, (_U0, _U0), out, (_U0, values),
            rows, keys, values // _LANES,
        )  # fmt: skip
        for b in range(_U0, rows, ROWS):
            stop = min(b + ROWS, rows)
            # A block of 16 rows of W is weighed and used while it is in the first cache.
            for r in range(b, stop):
                _decays(r, b + ROWS, g, top, w, r * side)
                from_start = weight(m_at[at] - top[r])
                for d in range(values):
                    out[r * values + d] *= from_start
            places = (b * values, values)
            product(
                w, (b * side, side, _U1), vs, (_U0, _LANES, values), out, places, out, places,
                stop - b, stop, values // _LANES,
            )  # fmt: skip
        for r in range(rows):
            normalizer = weight(m_at[at] - top[r]) * dot(keys, qs, r * keys, n_at, at * keys)
            normalizer += sum_of(r + _U1, w, r * side)
            # Added in float64, rounded once.
            m = F32(total[r] + top[r])
            inverse = ONE / (max(abs(normalizer), exp(-m)) + eps)
            here = (token + turned(r, turn)) * heads + head
            for d in range(V):
                h[here * V + d] = out[r * values + d] * inverse
            if norms.size > 0:
                norms[here * U(2)] = normalizer
                norms[here * U(2) + _U1] = m


def _padded(x: Tensor) -> Tensor:
    """A copy in float32 whose last dimensions are multiples of LANES: of C both, of n its only one."""
    sizes = [-x.shape[d] % LANES if d > 1 else 0 for d in reversed(range(x.dim()))]
    return torch.nn.functional.pad(x.detach().float(), [p for size in sizes for p in (0, size)]).clone()


def _chunk_size(keys: int, values: int) -> int:
    """About where the products within a chunk cost as much as those with its states."""
    # A multiple of 64, which LANES and ROWS divide.
    balance = 2 * keys * values / (keys + values)
    return 64 if balance < 96 else 128 if balance < 192 else 256


def _views(tensors: Iterable[Tensor]) -> tuple[np.ndarray, ...]:
    return tuple(x.view(-1).numpy() for x in tensors)


class _Call:
    """What both passes need: sizes, chunks, inputs as flat arrays, and the states at the start of every chunk."""

    def __init__(self, q, k, v, i, f, states, mask, cu_seqlens, eps, reverse):
        batch, time, heads, K = q.shape
        self.eps, V = F32(eps), v.shape[3]
        size = _chunk_size(K, V)
        offsets = np.arange(batch + 1) * time if cu_seqlens is None else cu_seqlens.numpy()
        per_sequence = -(-np.diff(offsets) // size)
        first = np.concatenate([[0], np.cumsum(per_sequence)])
        start = [np.arange(a, b, size) for a, b in pairwise(offsets)]
        stop = [np.minimum(s + size, b) for s, b in zip(start, offsets[1:], strict=True)]
        count = np.concatenate(stop) - np.concatenate(start)
        if reverse:  # chunks are cut from a sequence's end
            start = [a + b - s for s, (a, b) in zip(stop, pairwise(offsets), strict=True)]
        start = np.concatenate(start).astype(np.uint64)
        self.chunks = len(start)
        self.sizes = Sizes(U(size), U(heads), U(K), U(V), U(reverse))
        self.walk = Chunks(first.astype(np.uint64), start, count.astype(np.uint64))
        self.mask = np.empty(0, np.bool_) if mask is None else mask.reshape(-1).bool().numpy()
        i, log_f = i.detach().float(), torch.nn.functional.logsigmoid(f.detach().float()).clamp_min(FORGOTTEN)
        # Padding is a token that adds nothing and forgets nothing.
        if mask is not None:
            real = mask.bool()[..., None]
            i, log_f = i.where(real, -torch.inf), log_f.where(real, 0.0)
        self.gates = (i.reshape(-1).numpy(), log_f.reshape(-1).numpy())
        self.inputs = tuple(rows_apart(x.flatten(0, 1)) for x in (q, k, v))
        C, n, m = states or initial_states(q, v, len(offsets) - 1)
        # m in float64, as its differences to g count; copies, since the walk writes to them.
        self.last = [_padded(C), _padded(n), m.detach().to(torch.float64, copy=True)]
        self.at = [empty(self.chunks * heads, *s.shape[2:]).to(s.dtype) for s in self.last]
        self.starts = _views(self.at)
        states = _views(self.last)
        run(_states, self.sizes, self.walk, self.mask, self.inputs[1:], self.gates, states, self.starts)


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
    call = _Call(q, k, v, i, f, states, mask, cu_seqlens, eps, reverse)
    h, norms = empty(*v.shape), empty(*i.shape, 2 * training)
    run(
        _outputs, call.sizes, call.walk, call.mask, call.inputs, call.gates, call.starts, call.eps,
        *_views((h, norms)),
    )  # fmt: skip
    C, n, m = call.last
    C, n = C[..., : q.shape[3], : v.shape[3]].contiguous(), n[..., : q.shape[3]].contiguous()
    return h.to(q.dtype), norms, C, n, m.float()


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
    call = _Call(q, k, v, i, f, states, mask, cu_seqlens, eps, reverse)
    dC, dn, mu = [_padded(g) for g in grad_last] or [torch.zeros(s.shape) for s in call.last]
    # The loops have adjoints of C e^m and n e^m: what of the gradient of m goes through these is taken off, and put
    # back below.
    mu -= (dC * call.last[0]).sum((-1, -2)) + (dn * call.last[1]).sum(-1)
    dC_at, dn_at = empty(*call.at[0].shape), empty(*call.at[1].shape)
    inverses, d_normalizers, di, d_log_f = (empty(*i.shape) for _ in range(4))
    dq, dk, dv = empty(*q.shape), empty(*k.shape), empty(*v.shape)
    outputs = flat(h), flat(norms), flat(grad)
    ends, per_token, gates = _views((dC_at, dn_at)), _views((inverses, d_normalizers)), _views((di, d_log_f))
    run(
        adjoints, call.sizes, call.walk, call.mask, call.inputs[0], call.gates, call.starts[2], call.eps, outputs,
        _views((dC, dn, mu)), ends, per_token, gates,
    )  # fmt: skip
    run(
        gradients, call.sizes, call.walk, call.mask, call.inputs, call.gates, call.starts,
        outputs[2], ends, per_token, _views((dq, dk, dv)), gates,
    )  # fmt: skip
    df = d_log_f * torch.sigmoid(-f.detach().float())
    if mask is not None:
        df = df.where(mask.bool()[..., None], 0.0)
    dC, dn = dC[..., : q.shape[3], : v.shape[3]].contiguous(), dn[..., : q.shape[3]].contiguous()
    if states:
        mu += (dC * states[0]).sum((-1, -2)) + (dn * states[1]).sum(-1)
    of_inputs = [g.to(x.dtype) for g, x in zip((dq, dk, dv, di, df), (q, k, v, i, f), strict=True)]
    return *of_inputs, dC, dn, mu  # type: ignore[return-value]


@parallel
def _memory_step(K, V, strip, strips, q, k, v, forget, C, numerator):
    """C = forget C + k v^T and C^T q, C (N * H, K, V) read and written once: a row of it, all that a key adds to, is in
    the nearest cache while both are done."""
    for task in prange(U(forget.size) * strips):
        at, low = U(task) // strips, (U(task) % strips) * strip
        width = min(strip, V - low)
        keep, out = forget[at], at * V + low
        for d in range(width):
            numerator[out + d] = _ZERO
        for key in range(K):
            add, query, c = k[at * K + key], q[at * K + key], (at * K + key) * V + low
            for d in range(width):
                new = keep * C[c + d] + add * v[out + d]
                C[c + d] = new
                numerator[out + d] += query * new


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
    """See `op.decode`. Of a small C torch's three passes cost less than the start of a loop."""
    if not (worthwhile(C) and C.is_contiguous()):
        return reference.decode(q, k, v, i, f, C, n, m, real, eps)
    queries, keys, values, forget, denominator = reference.prepare_step(q, k, v, i, f, n, m, real, eps)
    (K, V), heads = C.shape[2:], forget.numel()
    strips = max(1, -(-torch.get_num_threads() // heads))  # a head is split where there are fewer of them than threads
    numerator = torch.empty(values.shape)
    run(
        _memory_step, U(K), U(V), U(-(-V // strips)), U(strips), flat(queries), flat(keys), flat(values), flat(forget),
        flat(C), flat(numerator),
    )  # fmt: skip
    return reference.finish_step(numerator, denominator, real, q.dtype)
