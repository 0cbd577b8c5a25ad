"""CPU backend: one compiled loop over time for each (head, share of the sequences), which no other has to wait for.

A task steps its sequences together, longest first, so that those still running are always the first rows of its
matrices: a small matrix product, R packed once per call and in cache from then on, then the gates, vectorised.
Measurements: docs/log.md, 2026-11-22.

Tensors come as flat arrays. `scratch` holds, for each sequence of a task, R h + b and what the gates make of it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import empty, flat
from hf_rnn_kernels.matrix_product import LANES, pack, product
from hf_rnn_kernels.perturbed.cpu import add
from hf_rnn_kernels.recurrent_scan.cpu_cells import KINDS, SLOTS, step, step_back
from hf_rnn_kernels.recurrent_scan.reference import CELLS, STEPS_BACK
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import F32, U, dot, parallel, prefetch, row


class _Sizes(NamedTuple):
    """All uint64; P is `size`, the number of states S is 1 + `kept`."""

    gates: np.uint64
    own: np.uint64  # of them, the last: with another gradient in R h + b than in x
    kept: np.uint64
    size: np.uint64
    heads: np.uint64
    groups: np.uint64  # of heads: a task walks one
    chunks: np.uint64  # shares of the sequences: a task walks one
    step: np.uint64  # to the token that is read next: 1, or -1 modulo 2^64, as all that is computed with it


class _Inputs(NamedTuple):
    """Flat arrays."""

    x: np.ndarray
    weight: np.ndarray  # R^T in panels
    bias: np.ndarray  # in panels
    mask: np.ndarray  # empty for none
    order: np.ndarray  # sequences, the longest first, dealt out to `chunks` in turn
    starts: np.ndarray  # the token that is read first
    lengths: np.ndarray
    first: np.ndarray  # states (S, N, H * P)


# 32, 128 and 256 took the same within 2%.
_BLOCK = U(64)  # rows of scratch that are filled before the next head's turn
_U0, _U1, _LANES = U(0), U(1), U(LANES)


@row
def _copy(size, source, from_, target, to):
    for d in range(size):
        target[to + d] = source[from_ + d]


@row
def _fill(size, target, to, value):
    for d in range(size):
        target[to + d] = value


@row
def _prefetch(size, x, x0):
    # Floats in a cache line.
    for d in range(_U0, size, U(16)):
        prefetch(x, x0 + d)


@parallel
def _forward(kind, sizes, inputs, outputs, perturbation):
    """`outputs`: h, the other states at every token, and the last ones; `perturbation`: rank K (0 for none), rows per
    member, and the members' factors and biases, (M, H, K, gates * P), (M, H, K, P) and (M, H, gates * P)."""
    # Unpacked before the parallel loop, to which numba hands the members of a group one by one.
    gates, _, kept, size, heads, groups, chunks, onwards = sizes
    x, weight, bias, mask, order, starts, lengths, first = inputs
    h, others, last = outputs
    rank, rows_per_member, left, right, biases = perturbation
    sequences, channels, many = U(order.size), heads * size, heads // groups
    next_x, next_h = onwards * heads * gates * size, onwards * channels
    panels = (gates * size + _LANES - _U1) // _LANES
    # A row holds R h + b in whole panels, then what the gates make of it.
    width = max(panels * _LANES, U(SLOTS) * size)
    for task in prange(groups * chunks):
        low, chunk = U(task) // chunks * many, U(task) % chunks
        rows = (sequences - chunk + chunks - _U1) // chunks
        apart = many * rows * size
        # h in memory of its own, so that the product reads dense rows, whatever the distance of tokens is.
        state = np.empty(apart, np.float32)
        rest = np.zeros((kept + _U1) * apart, np.float32)  # the other states, and one that is the cell's own
        scratch = np.empty(rows * width, np.float32)
        start, length = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        for r in range(rows):
            n = order[chunk + r * chunks]
            start[r], length[r] = starts[n], lengths[n]
            for k in range(many):
                at = n * channels + (low + k) * size
                _copy(size, first, at, state, (k * rows + r) * size)
                for j in range(kept):
                    from_ = (j + _U1) * sequences * channels + at
                    _copy(size, first, from_, rest, j * apart + (k * rows + r) * size)
        steps = max(_U1, _BLOCK // rows)
        at_block = rows
        # Heads in turn, a few steps each, so that the scratch of a turn and R of one head are in cache. With this, and
        # the gradients of the weights in the loop, 56 and 210 ms (forward; with backward) instead of 67 and 308.
        for block in range(_U0, length[0], steps):
            for k in range(many):
                head, running = low + k, at_block
                for t in range(block, min(block + steps, length[0])):
                    # The longest first: those that have ended are the last rows, and the product leaves them out.
                    while length[running - _U1] <= t:
                        running -= _U1
                    product(
                        state, (k * rows * size, size, _U1),
                        weight, (head * panels * _LANES * size, _LANES * size, _LANES),
                        bias, (head * panels * _LANES, _U0),
                        scratch, (_U0, width),
                        running, size, panels,
                    )  # fmt: skip
                    for r in range(running):
                        token, s = start[r] + t * onwards, (k * rows + r) * size
                        x0, at = (token * heads + head) * gates * size, token * channels + head * size
                        # A task reads one head's piece of each token: too far apart for the processor to foresee.
                        _prefetch(gates * size, x, x0 + next_x)
                        _prefetch(size, h, at + next_h)
                        # A perturbed copy's R is never formed.
                        if rank > 0:
                            own = order[chunk + r * chunks] // rows_per_member * heads + head
                            add(gates * size, scratch, r * width, F32(1), biases, own * gates * size)
                            for j in range(own * rank, (own + _U1) * rank):
                                u = dot(size, state, s, right, j * size)
                                add(gates * size, scratch, r * width, u, left, j * gates * size)
                        # Of padding R h is computed, too: sorting it out would cost the product its whole rows.
                        if mask.size == 0 or mask[token]:
                            step(kind, size, x, x0, scratch, r * width, state, rest, s, apart)
                        # Stores past the caches made the forward pass 64 instead of 56 ms.
                        _copy(size, state, s, h, at)
                        if others.size > 0:
                            for j in range(kept):
                                to = (token * kept + j) * channels + head * size
                                _prefetch(size, others, to + kept * next_h)
                                _copy(size, rest, j * apart + s, others, to)
                if k == many - _U1:
                    at_block = running
        for r in range(rows):
            n = order[chunk + r * chunks]
            for k in range(many):
                at = n * channels + (low + k) * size
                _copy(size, state, (k * rows + r) * size, last, at)
                for j in range(kept):
                    to = (j + _U1) * sequences * channels + at
                    _copy(size, rest, j * apart + (k * rows + r) * size, last, to)


@parallel
def _backward(kind, sizes, inputs, transposed, saved, grad, grads, gradients):
    """`transposed`: R^T packed; `saved`: h and the other states at every token; `grads` (S, N, H * P) holds the
    gradients of the last states on entry, those of the first states on return. `gradients`: of x; of the weight
    (chunks, H, gates * P, padded P) and the bias (chunks, H, gates * P), which are added to after a block of steps,
    while their gate gradients and states are in cache.
    """
    gates, own, kept, size, heads, groups, chunks, onwards = sizes
    x, weight, bias, mask, order, starts, lengths, first = inputs
    h, others = saved
    grad_x, grad_weight, grad_bias = gradients
    sequences, channels, many = U(order.size), heads * size, heads // groups
    next_x, next_h = onwards * heads * gates * size, onwards * channels
    panels, back_panels = (gates * size + _LANES - _U1) // _LANES, (size + _LANES - _U1) // _LANES
    width, padded = max(panels * _LANES, U(SLOTS) * size), back_panels * _LANES
    for task in prange(groups * chunks):
        low, chunk = U(task) // chunks * many, U(task) % chunks
        rows = (sequences - chunk + chunks - _U1) // chunks
        steps = max(_U1, _BLOCK // rows)
        # Zeros behind each row stay: the product for the weight takes whole panels.
        before = np.zeros(steps * rows * padded, np.float32)
        apart = many * rows * padded
        dh, d_rest = np.zeros(apart, np.float32), np.zeros(kept * apart, np.float32)
        scratch = np.empty(steps * rows * width, np.float32)
        start, length = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        for r in range(rows):
            n = order[chunk + r * chunks]
            start[r], length[r] = starts[n], lengths[n]
            for k in range(many):
                at = n * channels + (low + k) * size
                _copy(size, grads, at, dh, (k * rows + r) * padded)
                for j in range(kept):
                    from_ = (j + _U1) * sequences * channels + at
                    _copy(size, grads, from_, d_rest, j * apart + (k * rows + r) * padded)
        at_block = _U0
        for block in range(_U0, length[0], steps):
            for k in range(many):
                head, running, filled = low + k, at_block, _U0
                for back in range(block, min(block + steps, length[0])):
                    t = length[0] - _U1 - back
                    while running < rows and length[running] > t:
                        running += _U1
                    # Gates are computed again. Storing them in the forward pass saved 6% of both and took 200 MB more.
                    for r in range(running):
                        at = (start[r] + t * onwards) * channels + head * size
                        n = order[chunk + r * chunks]
                        if t > _U0:
                            _copy(size, h, at - next_h, before, (filled + r) * padded)
                        else:
                            _copy(size, first, n * channels + head * size, before, (filled + r) * padded)
                    product(
                        before, (filled * padded, padded, _U1),
                        weight, (head * panels * _LANES * size, _LANES * size, _LANES),
                        bias, (head * panels * _LANES, _U0),
                        scratch, (filled * width, width),
                        running, size, panels,
                    )  # fmt: skip
                    for r in range(running):
                        token, s0, s = start[r] + t * onwards, (filled + r) * width, (k * rows + r) * padded
                        x0, at = (token * heads + head) * gates * size, token * channels + head * size
                        _prefetch(gates * size, x, x0 - next_x)
                        _prefetch(gates * size, grad_x, x0 - next_x)
                        _prefetch(size, h, at - next_h - next_h)
                        _prefetch(size, grad, at - next_h)
                        after = token * kept * channels + head * size
                        for j in range(kept):
                            _prefetch(size, others, after + j * channels - U(2) * kept * next_h)
                        # What was before the first step lies otherwise: states outside, sequences inside.
                        rest, b0, far = others, after - kept * next_h, channels
                        if t == _U0:
                            far = sequences * channels
                            rest, b0 = first, far + order[chunk + r * chunks] * channels + head * size
                        if mask.size > 0 and not mask[token]:
                            for d in range(size):
                                dh[s + d] += grad[at + d]
                            # Zeros go through the two products that follow and change nothing.
                            _fill(U(SLOTS) * size, scratch, s0, F32(0))
                        else:
                            at_step = (x0, s0, (filled + r) * padded, at)
                            step_back(
                                kind, size, x, scratch, before, rest, others, grad, dh, d_rest,
                                at_step, (b0, far), (after, channels), (s, apart),
                            )  # fmt: skip
                        # Behind all that R h + b gets scratch has what x gets in the place of the last of it.
                        _copy((gates - own) * size, scratch, s0, grad_x, x0)
                        if own > _U0:
                            _copy(own * size, scratch, s0 + gates * size, grad_x, x0 + (gates - own) * size)
                    product(
                        scratch, (filled * width, width, _U1),
                        transposed, (head * back_panels * _LANES * gates * size, _LANES * gates * size, _LANES),
                        dh, (k * rows * padded, padded),
                        dh, (k * rows * padded, padded),
                        running, gates * size, back_panels,
                    )  # fmt: skip
                    filled += running
                # In the loop: 29 ms, where `torch.bmm` over all tokens afterwards took 53.
                places = ((chunk * heads + head) * gates * size * padded, padded)
                product(
                    scratch, (_U0, _U1, width), before, (_U0, _LANES, padded), grad_weight, places, grad_weight, places,
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
                for j in range(kept):
                    to = (j + _U1) * sequences * channels + at
                    _copy(size, d_rest, j * apart + (k * rows + r) * padded, grads, to)


def _arguments(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[int, _Sizes, _Inputs]:
    heads, _, size = weight.shape
    batch, time, _ = x.shape
    offsets = np.arange(batch + 1) * time if cu_seqlens is None else cu_seqlens.numpy()
    sequences, lengths, starts = len(offsets) - 1, np.diff(offsets), offsets[1:] - 1 if reverse else offsets[:-1]
    # Zeros where none are given: arrays of the same types in any case, and one compilation.
    shape = (CELLS[cell].states, sequences, heads * size)
    first = torch.stack(states).float() if states else torch.zeros(shape)
    # Stable, so that equal lengths stay in the order of memory.
    order = np.argsort(-lengths, kind="stable")
    # As few shares of the sequences as keep every thread busy: each share reads all of R at every step
    groups = math.gcd(heads, torch.get_num_threads())
    chunks = min(sequences, torch.get_num_threads() // groups)
    bias = torch.zeros(heads, 1, weight.shape[1]) if bias is None else bias.detach().float().view(heads, 1, -1)
    known = CELLS[cell]
    counts = known.gates, STEPS_BACK[cell].own, known.states - 1, size, heads, groups, chunks
    sizes = _Sizes(*map(U, counts), U(2**64 - 1 if reverse else 1))
    inputs = _Inputs(
        x=flat(x),
        weight=flat(pack(weight.detach().float().transpose(1, 2))),
        bias=flat(pack(bias)),
        mask=np.empty(0, np.bool_) if mask is None else mask.reshape(-1).bool().numpy(),
        order=order.astype(np.uint64),
        starts=starts.astype(np.uint64),
        lengths=lengths.astype(np.uint64),
        first=flat(first),
    )
    return KINDS[cell], sizes, inputs


def scan(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    training: bool = False,
    perturbation: Sequence[Tensor] = (),
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.scan`."""
    kind, sizes, inputs = _arguments(cell, x, weight, bias, states, mask, cu_seqlens, reverse)
    batch, time, _ = x.shape
    channels, count = weight.shape[0] * weight.shape[2], CELLS[cell].states
    h, last = empty(batch, time, channels), empty(count, len(inputs.order), channels)
    others = empty(batch, time, count - 1 if training else 0, channels)
    # Rank 0: never read.
    left, right, biases = perturbation or (torch.empty(1, 1, 0, 0),) * 3
    factors = (flat(left.transpose(2, 3)), flat(right.transpose(2, 3)), flat(biases))
    members = (U(left.shape[3]), U(last.shape[1] // left.shape[0]), *factors)
    run(_forward, kind, sizes, inputs, (flat(h), flat(others), flat(last)), members)
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
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `op.scan_backward`."""
    kind, sizes, inputs = _arguments(cell, x, weight, bias, states, mask, cu_seqlens, reverse)
    chunks, (heads, rows, size) = int(sizes.chunks), weight.shape
    grads = grad_last.float().clone(memory_format=torch.contiguous_format)
    grad_x, transposed = empty(*x.shape), pack(weight.detach().float())
    grad_weight, grad_bias = (
        torch.zeros(chunks, heads, rows, -(-size // LANES) * LANES),
        torch.zeros(chunks, heads, rows),
    )
    gradients = (flat(grad_x), flat(grad_weight), flat(grad_bias))
    run(
        _backward, kind, sizes, inputs, flat(transposed), (flat(h), flat(others)), flat(grad), flat(grads), gradients
    )  # fmt: skip
    grad_weight = grad_weight.sum(0)[..., :size]
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.sum(0).flatten(), grads
