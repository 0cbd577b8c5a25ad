"""CPU backend: one compiled loop over time for each (head, share of the sequences), which no other has to wait for.

A task steps its sequences together, longest first, so that those still running are always the first rows of its
matrices: a small matrix product, R packed once per call and in cache from then on, then the gates, vectorised.
Measurements: docs/log.md, 2026-11-22.

Tensors come as flat arrays. `scratch` holds, for each sequence of a task, R h + b and what the gates make of it.
"""

import math

import numpy as np
import torch
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import empty, flat
from hf_rnn_kernels.matrix_product import LANES, pack, product
from hf_rnn_kernels.recurrent_scan.reference import CELLS
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import F32, HALF, ONE, U, decay, parallel, prefetch, row, sigmoids, tanh

_LSTM, _GRU = range(2)
_KINDS = {"lstm": _LSTM, "gru": _GRU}
_SLOTS = 5  # of P floats in a row of scratch
_BLOCK = U(64)  # rows of scratch that are filled before the next head's turn
_U0, _U1, _LANES = U(0), U(1), U(LANES)

# One sequence's row of one head. `s0` is where its scratch begins, `x0` its pre-activations. What the loops write is
# scratch; tensors are filled by copies, since LLVM gives up on a loop over too many arrays that might overlap.


@row
def _copy(size, source, from_, target, to):
    for d in range(size):
        target[to + d] = source[from_ + d]


@row
def _fill(size, target, to, value):
    for d in range(size):
        target[to + d] = value


@row
def _lstm_gates(size, x, x0, s, s0):
    """R h + b in scratch to i, f, tanh(g), o, 1 - f."""
    f, g, o, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        s[s0 + d] = sigmoids(s[s0 + d] + x[x0 + d])[1]
    for d in range(size):
        s[drop + d], s[f + d] = sigmoids(s[f + d] + x[x0 + size + d])
    for d in range(size):
        s[g + d] = tanh(s[g + d] + x[x0 + U(2) * size + d])
    for d in range(size):
        s[o + d] = sigmoids(s[o + d] + x[x0 + U(3) * size + d])[1]


@row
def _lstm_step(size, s, s0, h, c, at):
    f, g, o, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        add = s[s0 + d] * s[g + d]
        slow = c[at + d] + (add - s[drop + d] * c[at + d])
        new = slow if s[drop + d] < HALF else s[f + d] * c[at + d] + add
        c[at + d] = new
        h[at + d] = s[o + d] * tanh(new)


@row
def _lstm_step_back(size, s, s0, before, b0, after, a0, grad, grad0, dh, dc, at):
    """Gates in scratch to the gradients of their pre-activations; dh, dc from after the step to before it."""
    f, g, o, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        tanh_c = tanh(after[a0 + d])
        dh_t = dh[at + d] + grad[grad0 + d]
        dc[at + d] += dh_t * s[o + d] * (ONE - tanh_c * tanh_c)
        dh[at + d] = F32(0)
        s[o + d] = dh_t * tanh_c * s[o + d] * (ONE - s[o + d])
    for d in range(size):
        gate_i, gate_g = s[s0 + d], s[g + d]
        s[s0 + d] = dc[at + d] * gate_g * gate_i * (ONE - gate_i)
        s[g + d] = dc[at + d] * gate_i * (ONE - gate_g * gate_g)
    for d in range(size):
        dc_t = dc[at + d]
        dc[at + d] = decay(s[f + d], s[drop + d], dc_t)
        s[f + d] = dc_t * before[b0 + d] * s[f + d] * s[drop + d]


@row
def _gru_gates(size, x, x0, s, s0):
    """R h + b in scratch to r, z, R_n h + b_n as it was, n, 1 - z."""
    z, hn, n, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        s[s0 + d] = sigmoids(s[s0 + d] + x[x0 + d])[1]
    for d in range(size):
        s[drop + d], s[z + d] = sigmoids(s[z + d] + x[x0 + size + d])
    for d in range(size):
        s[n + d] = tanh(x[x0 + U(2) * size + d] + s[s0 + d] * s[hn + d])


@row
def _gru_step(size, s, s0, h, at):
    z, n, drop = s0 + size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        step = s[n + d] - h[at + d]
        h[at + d] = h[at + d] + s[drop + d] * step if s[drop + d] < HALF else s[n + d] - s[z + d] * step


@row
def _gru_step_back(size, s, s0, before, b0, grad, grad0, dh, at):
    """As `_lstm_step_back`: to the gradients of r, z, R_n h + b_n and n."""
    z, hn, n, drop = s0 + size, s0 + U(2) * size, s0 + U(3) * size, s0 + U(4) * size
    for d in range(size):
        dh_t = dh[at + d] + grad[grad0 + d]
        r, new = s[s0 + d], s[n + d]
        dn = dh_t * s[drop + d] * (ONE - new * new)
        dh[at + d] = decay(s[z + d], s[drop + d], dh_t)
        s[s0 + d] = dn * s[hn + d] * r * (ONE - r)
        s[z + d] = dh_t * (before[b0 + d] - new) * s[z + d] * s[drop + d]
        s[hn + d] = dn * r
        s[n + d] = dn


@row
def _prefetch(size, x, x0):
    for d in range(_U0, size, U(16)):
        prefetch(x, x0 + d)


@parallel
def _forward(kind, gates, size, heads, groups, chunks, x, weight, bias, mask, order, offsets, first, h, others, last):
    """`first`, `last`: states (S, N, H * P); `order`: sequences, the longest first, dealt out to `chunks` in turn."""
    sequences, channels, many = U(order.size), heads * size, heads // groups
    panels = (gates * size + _LANES - _U1) // _LANES
    width = max(panels * _LANES, U(_SLOTS) * size)
    for task in prange(groups * chunks):
        low, chunk = U(task) // chunks * many, U(task) % chunks
        rows = (sequences - chunk + chunks - _U1) // chunks
        state, cell = np.empty(many * rows * size, np.float32), np.empty(many * rows * size, np.float32)
        scratch = np.empty(rows * width, np.float32)
        start, length = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        for r in range(rows):
            n = order[chunk + r * chunks]
            start[r], length[r] = offsets[n], offsets[n + _U1] - offsets[n]
            for k in range(many):
                at = n * channels + (low + k) * size
                _copy(size, first, at, state, (k * rows + r) * size)
                if kind == _LSTM:
                    _copy(size, first, sequences * channels + at, cell, (k * rows + r) * size)
        steps = max(_U1, _BLOCK // rows)
        at_block = rows
        for block in range(_U0, length[0], steps):
            for k in range(many):
                head, running = low + k, at_block
                for t in range(block, min(block + steps, length[0])):
                    while length[running - _U1] <= t:
                        running -= _U1
                    product(
                        state, k * rows * size, size, _U1,
                        weight, head * panels * _LANES * size, _LANES * size, _LANES,
                        bias, head * panels * _LANES, _U0, scratch, _U0, width, running, size, panels,
                    )  # fmt: skip
                    for r in range(running):
                        token, s = start[r] + t, (k * rows + r) * size
                        x0, at = (token * heads + head) * gates * size, token * channels + head * size
                        _prefetch(gates * size, x, x0 + heads * gates * size)
                        _prefetch(size, h, at + channels)
                        if others.size > 0:
                            _prefetch(size, others, at + channels)
                        if mask.size == 0 or mask[token]:
                            if kind == _LSTM:
                                _lstm_gates(size, x, x0, scratch, r * width)
                                _lstm_step(size, scratch, r * width, state, cell, s)
                            else:
                                _gru_gates(size, x, x0, scratch, r * width)
                                _gru_step(size, scratch, r * width, state, s)
                        _copy(size, state, s, h, at)
                        if others.size > 0:
                            _copy(size, cell, s, others, at)
                if k == many - _U1:
                    at_block = running
        for r in range(rows):
            n = order[chunk + r * chunks]
            for k in range(many):
                at = n * channels + (low + k) * size
                _copy(size, state, (k * rows + r) * size, last, at)
                if kind == _LSTM:
                    _copy(size, cell, (k * rows + r) * size, last, sequences * channels + at)


@parallel
def _backward(
    kind, gates, size, heads, groups, chunks, x, weight, bias, mask, order, offsets, first, h, others, transposed, grad,
    grads, grad_x, grad_weight, grad_bias,
):  # fmt: skip
    """`grads` (S, N, H * P) holds the gradients of the last states on entry, those of the first states on return.

    `grad_weight` (chunks, H, gates * P, padded P) and `grad_bias` (chunks, H, gates * P) are added to: after a block
    of steps, while their gate gradients and states are in cache.
    """
    sequences, channels, many = U(order.size), heads * size, heads // groups
    panels, back_panels = (gates * size + _LANES - _U1) // _LANES, (size + _LANES - _U1) // _LANES
    width, padded = max(panels * _LANES, U(_SLOTS) * size), back_panels * _LANES
    for task in prange(groups * chunks):
        low, chunk = U(task) // chunks * many, U(task) % chunks
        rows = (sequences - chunk + chunks - _U1) // chunks
        steps = max(_U1, _BLOCK // rows)
        before = np.zeros(steps * rows * padded, np.float32)
        dh, dc = np.zeros(many * rows * padded, np.float32), np.zeros(many * rows * padded, np.float32)
        scratch = np.empty(steps * rows * width, np.float32)
        start, length = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        for r in range(rows):
            n = order[chunk + r * chunks]
            start[r], length[r] = offsets[n], offsets[n + _U1] - offsets[n]
            for k in range(many):
                at = n * channels + (low + k) * size
                _copy(size, grads, at, dh, (k * rows + r) * padded)
                if kind == _LSTM:
                    _copy(size, grads, sequences * channels + at, dc, (k * rows + r) * padded)
        at_block = _U0
        for block in range(_U0, length[0], steps):
            for k in range(many):
                head, running, filled = low + k, at_block, _U0
                for back in range(block, min(block + steps, length[0])):
                    t = length[0] - _U1 - back
                    while running < rows and length[running] > t:
                        running += _U1
                    for r in range(running):
                        at = (start[r] + t) * channels + head * size
                        n = order[chunk + r * chunks]
                        if t > _U0:
                            _copy(size, h, at - channels, before, (filled + r) * padded)
                        else:
                            _copy(size, first, n * channels + head * size, before, (filled + r) * padded)
                    product(
                        before, filled * padded, padded, _U1,
                        weight, head * panels * _LANES * size, _LANES * size, _LANES,
                        bias, head * panels * _LANES, _U0, scratch, filled * width, width, running, size, panels,
                    )  # fmt: skip
                    for r in range(running):
                        token, s0, s = start[r] + t, (filled + r) * width, (k * rows + r) * padded
                        x0, at = (token * heads + head) * gates * size, token * channels + head * size
                        _prefetch(gates * size, x, x0 - heads * gates * size)
                        _prefetch(gates * size, grad_x, x0 - heads * gates * size)
                        _prefetch(size, h, at - channels - channels)
                        _prefetch(size, grad, at - channels)
                        if kind == _LSTM:
                            _prefetch(size, others, at - channels - channels)
                        if mask.size > 0 and not mask[token]:
                            for d in range(size):
                                dh[s + d] += grad[at + d]
                            _fill(U(_SLOTS) * size, scratch, s0, F32(0))
                        elif kind == _LSTM:
                            _lstm_gates(size, x, x0, scratch, s0)
                            c0 = (sequences + order[chunk + r * chunks]) * channels + head * size
                            c, c0 = (others, at - channels) if t > _U0 else (first, c0)
                            _lstm_step_back(size, scratch, s0, c, c0, others, at, grad, at, dh, dc, s)
                        else:
                            _gru_gates(size, x, x0, scratch, s0)
                            _gru_step_back(size, scratch, s0, before, (filled + r) * padded, grad, at, dh, s)
                        if kind == _LSTM:
                            _copy(gates * size, scratch, s0, grad_x, x0)
                        else:
                            _copy(U(2) * size, scratch, s0, grad_x, x0)
                            _copy(size, scratch, s0 + U(3) * size, grad_x, x0 + U(2) * size)
                    product(
                        scratch, filled * width, width, _U1,
                        transposed, head * back_panels * _LANES * gates * size, _LANES * gates * size, _LANES,
                        dh, k * rows * padded, padded, dh, k * rows * padded, padded,
                        running, gates * size, back_panels,
                    )  # fmt: skip
                    filled += running
                product(
                    scratch, _U0, _U1, width, before, _U0, _LANES, padded,
                    grad_weight, (chunk * heads + head) * gates * size * padded, padded,
                    grad_weight, (chunk * heads + head) * gates * size * padded, padded,
                    gates * size, filled, back_panels,
                )  # fmt: skip
                for r in range(filled):
                    for d in range(gates * size):
                        grad_bias[(chunk * heads + head) * gates * size + d] += scratch[r * width + d]
                if k == many - _U1:
                    at_block = running
        for r in range(rows):
            n = order[chunk + r * chunks]
            for k in range(many):
                at = n * channels + (low + k) * size
                _copy(size, dh, (k * rows + r) * padded, grads, at)
                if kind == _LSTM:
                    _copy(size, dc, (k * rows + r) * padded, grads, sequences * channels + at)


def _arguments(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple:
    heads, _, size = weight.shape
    batch, time, _ = x.shape
    offsets = np.arange(batch + 1) * time if cu_seqlens is None else cu_seqlens.numpy()
    sequences = len(offsets) - 1
    shape = (CELLS[cell].states, sequences, heads * size)
    first = torch.stack(states).float() if states else torch.zeros(shape)
    order = np.argsort(-np.diff(offsets), kind="stable")
    # As few shares of the sequences as keep every thread busy: each share reads all of R at every step
    groups = math.gcd(heads, torch.get_num_threads())
    chunks = min(sequences, torch.get_num_threads() // groups)
    bias = torch.zeros(heads, 1, weight.shape[1]) if bias is None else bias.detach().float().view(heads, 1, -1)
    return (
        _KINDS[cell],
        U(CELLS[cell].gates),
        U(size),
        U(heads),
        U(groups),
        U(chunks),
        flat(x),
        flat(pack(weight.detach().float().transpose(1, 2))),
        flat(pack(bias)),
        np.empty(0, np.bool_) if mask is None else mask.reshape(-1).bool().numpy(),
        order.astype(np.uint64),
        offsets.astype(np.uint64),
        flat(first),
    )


def scan(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.scan`."""
    arguments = _arguments(cell, x, weight, bias, states, mask, cu_seqlens)
    batch, time, _ = x.shape
    channels, count = weight.shape[0] * weight.shape[2], CELLS[cell].states
    h, last = empty(batch, time, channels), empty(count, len(arguments[-2]) - 1, channels)
    others = empty(batch, time, count - 1 if training else 0, channels)
    run(_forward, *arguments, flat(h), flat(others), flat(last))
    return h.to(x.dtype), others, last


def scan_backward(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    others: Tensor,
    grad: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `op.scan_backward`."""
    arguments = _arguments(cell, x, weight, bias, states, mask, cu_seqlens)
    chunks, (heads, rows, size) = int(arguments[5]), weight.shape
    grads = grad_last.float().clone(memory_format=torch.contiguous_format)
    grad_x, transposed = empty(*x.shape), pack(weight.detach().float())
    grad_weight, grad_bias = (
        torch.zeros(chunks, heads, rows, -(-size // LANES) * LANES),
        torch.zeros(chunks, heads, rows),
    )
    run(
        _backward, *arguments, flat(h), flat(others), flat(transposed), flat(grad), flat(grads), flat(grad_x),
        flat(grad_weight), flat(grad_bias),
    )  # fmt: skip
    grad_weight = grad_weight.sum(0)[..., :size]
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.sum(0).flatten(), grads
