"""CPU backend: one compiled pass over the rows, vectorised over channels, threads over sequences and channel strips.

numba compiles these loops on first use and keeps the result on disk, so the user needs no compiler. Measurements:
docs/log.md, 2026-11-22.

Rows are time steps: tensors come as flat arrays with a row stride, so that the two halves of one projection are read
in place. `offsets[n] : offsets[n + 1]` are the rows of sequence n.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import empty, flat
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import F32, HALF, ONE, TWO, U, decay, exp, inline, parallel, row, sigmoids


@inline
def _gate_shares(forget, input_):
    """f / (f + i) and i / (f + i) for f, i = sigmoid of the arguments, without the underflow of f + i.

    i : f = (1 + e^-|forget|) : (1 + e^-|input|) * e^(relu(-input) - relu(-forget)).
    """
    zero = F32(0)
    low_f = -forget if forget < zero else zero
    low_i = -input_ if input_ < zero else zero
    i = ONE + exp(-abs(forget))
    f = (ONE + exp(-abs(input_))) * exp(low_i - low_f)
    scale = ONE / (f + i)
    return f * scale, i * scale


@inline
def _candidate(x, positive):
    """g(x) and its slope if `positive`, else x and 1."""
    below = ONE / (ONE + exp(-x))
    g, slope = (x + HALF, ONE) if x >= F32(0) else (below, below * (ONE - below))
    return (g, slope) if positive else (x, ONE)


@inline
def _lstm_gates(forget, input_, normalize):
    """keep, drop = 1 - keep, and what the candidate is multiplied by."""
    if normalize:
        keep, share = _gate_shares(forget, input_)
        return keep, share, share
    drop, keep = sigmoids(forget)
    return keep, drop, sigmoids(input_)[1]


@inline
def _step(h, lost, keep, drop, add, goal):
    """keep * h + add * goal, and what its rounding lost, to be handed to the next step.

    A slow gate adds a little to a lot, thousands of times: `lost` carries the rounding error along (Kahan). Halves keep
    the difference of two large values from overflowing; scaling by 2 is exact.
    """
    # h + z (g - h) alone, at 65,536 steps: off by 7.6e-7 with a gate's bias of -8, and the gradient of h0 by 3.1e-4
    # with +8; this way 2.3e-8 and 4.0e-8.
    half, gain = HALF * h, add * (HALF * goal)
    step = (gain - drop * half) - lost
    slow = half + step
    is_slow = drop < HALF
    # Both are computed and one is taken: a branch would stop the vectoriser.
    return TWO * (slow if is_slow else keep * half + gain), ((slow - half) - step) if is_slow else F32(0)


# One time step over `width` channels each, on flat arrays; what begins where in them comes beside: `at` for the inputs,
# `to` for their gradients. Offsets are grouped and arrays not, but for the inputs once a task: each new tuple with an
# array in it would count references, at every row.


@row
def _linear_row(width, inputs, at, h, h0, out, out0):
    (a, b, _), (a0, b0, _) = inputs, at
    for d in range(width):
        value = a[a0 + d] * h[h0 + d] + b[b0 + d]
        h[h0 + d] = value
        out[out0 + d] = value


@row
def _linear_row_backward(width, inputs, at, before, before0, carry, carry0, grad, grad0, grads, to):
    (a, _, _), (a0, _, _), (da0, db0, _) = inputs, at, to
    for d in range(width):
        dh = carry[carry0 + d] + grad[grad0 + d]
        grads[db0 + d] = dh
        grads[da0 + d] = dh * before[before0 + d]
        carry[carry0 + d] = a[a0 + d] * dh


@row
def _min_gru_row(width, inputs, at, h, h0, lost, out, out0, positive):
    (gate, candidate, _), (gate0, candidate0, _) = inputs, at
    for d in range(width):
        keep, z = sigmoids(gate[gate0 + d])
        goal, _ = _candidate(candidate[candidate0 + d], positive)
        value, lost[d] = _step(h[h0 + d], lost[d], keep, z, z, goal)
        h[h0 + d] = value
        out[out0 + d] = value


@row
def _min_gru_row_backward(width, inputs, at, before, before0, carry, carry0, grad, grad0, grads, to, positive):
    (gate, candidate, _), (gate0, candidate0, _), (dg0, dc0, _) = inputs, at, to
    for d in range(width):
        keep, z = sigmoids(gate[gate0 + d])
        goal, slope = _candidate(candidate[candidate0 + d], positive)
        dh = carry[carry0 + d] + grad[grad0 + d]
        half_step = HALF * goal - HALF * before[before0 + d]
        grads[dg0 + d] = dh * ((TWO * z * keep) * half_step)
        grads[dc0 + d] = dh * z * slope
        carry[carry0 + d] = decay(keep, z, dh)


@row
def _min_lstm_row(width, inputs, at, h, h0, lost, out, out0, positive, normalize):
    (forget, input_, candidate), (f0, i0, c0) = inputs, at
    for d in range(width):
        keep, drop, add = _lstm_gates(forget[f0 + d], input_[i0 + d], normalize)
        goal, _ = _candidate(candidate[c0 + d], positive)
        value, lost[d] = _step(h[h0 + d], lost[d], keep, drop, add, goal)
        h[h0 + d] = value
        out[out0 + d] = value


@row
def _min_lstm_row_backward(
    width, inputs, at, before, before0, carry, carry0, grad, grad0, grads, to, positive, normalize
):
    (forget, input_, candidate), (f0, i0, c0), (df0, di0, dc0) = inputs, at, to
    for d in range(width):
        f, i = forget[f0 + d], input_[i0 + d]
        keep, drop, add = _lstm_gates(f, i, normalize)
        goal, slope = _candidate(candidate[c0 + d], positive)
        dh = carry[carry0 + d] + grad[grad0 + d]
        # Normalised, through log(i / f), of which i / (f + i) is the sigmoid. No branches with stores: LLVM would not
        # vectorise the loop.
        half_step = HALF * goal - HALF * before[before0 + d]
        grad_log_ratio = dh * ((TWO * add * keep) * half_step)
        grad_f = -grad_log_ratio * sigmoids(f)[0] if normalize else dh * (before[before0 + d] * (drop * keep))
        grad_i = grad_log_ratio if normalize else dh * (goal * add)
        grads[df0 + d] = grad_f
        grads[di0 + d] = grad_i * sigmoids(i)[0]
        grads[dc0 + d] = dh * add * slope
        carry[carry0 + d] = decay(keep, drop, dh)


_LINEAR, _MIN_GRU, _MIN_LSTM = range(3)
U1 = U(1)


class _Cell(NamedTuple):
    kind: int
    positive: bool
    normalize: bool


class _Layout(NamedTuple):
    mask: np.ndarray  # empty for none
    offsets: np.ndarray  # uint64
    reverse: bool


# A flat buffer and unsigned indices: 0.22 ms where slices, whose references are counted, took 0.40.
@parallel
def _forward(cell, sizes, inputs, layout, h0, out, last):
    """`last` is the running state."""
    # Unpacked before the parallel loop, to which numba hands the members of a group one by one.
    (kind, positive, normalize), (channels, strip) = cell, sizes
    (x, x_apart), (y, y_apart), (z, z_apart) = inputs
    mask, offsets, reverse = layout
    strips = (channels + strip - U1) // strip
    for task in prange(U(offsets.size - 1) * strips):
        n = U(task) // strips
        low = (U(task) % strips) * strip
        width = min(strip, channels - low)
        s, arrays = n * channels + low, (x, y, z)
        lost = np.zeros(width, np.float32)
        for d in range(width):
            last[s + d] = h0[s + d]
        for step in range(offsets[n + U1] - offsets[n]):
            t = offsets[n + U1] - U1 - step if reverse else offsets[n] + step
            at = (t * x_apart + low, t * y_apart + low, t * z_apart + low)
            o = t * channels + low
            # Padding: the state passes, and so does what rounding lost of it.
            if mask.size > 0 and not mask[t]:
                for d in range(width):
                    out[o + d] = last[s + d]
            # One branch a row, outside the loops over channels.
            elif kind == _LINEAR:
                _linear_row(width, arrays, at, last, s, out, o)
            elif kind == _MIN_GRU:
                _min_gru_row(width, arrays, at, last, s, lost, out, o, positive)
            else:
                _min_lstm_row(width, arrays, at, last, s, lost, out, o, positive, normalize)


@parallel
def _backward(cell, sizes, inputs, layout, h0, h, grad, grads, carry):
    """`carry` holds the gradient of the last states on entry and that of the initial states on return."""
    (kind, positive, normalize), (channels, strip) = cell, sizes
    (x, x_apart), (y, y_apart), (z, z_apart) = inputs
    mask, offsets, reverse = layout
    strips = (channels + strip - U1) // strip
    # 2 or 3 inputs, whose gradients lie side by side in a row as the halves of a projection do.
    count = U(grads.size) // max(U(grad.size), U1)
    for task in prange(U(offsets.size - 1) * strips):
        n = U(task) // strips
        low = (U(task) % strips) * strip
        width = min(strip, channels - low)
        s, arrays = n * channels + low, (x, y, z)
        for back in range(offsets[n + U1] - offsets[n]):
            t = offsets[n] + back if reverse else offsets[n + U1] - U1 - back
            at = (t * x_apart + low, t * y_apart + low, t * z_apart + low)
            o = t * channels + low
            # The state before is the row before (behind) in h, which is kept anyway.
            neighbour = o + channels if reverse else o - channels
            before, b = (h, neighbour) if back + U1 < offsets[n + U1] - offsets[n] else (h0, s)
            dx = t * count * channels + low
            to = (dx, dx + channels, dx + U(2) * channels)
            if mask.size > 0 and not mask[t]:
                for d in range(width):
                    carry[s + d] += grad[o + d]
                for i in range(count):
                    for d in range(width):
                        grads[dx + i * channels + d] = F32(0)
            elif kind == _LINEAR:
                _linear_row_backward(width, arrays, at, before, b, carry, s, grad, o, grads, to)
            elif kind == _MIN_GRU:
                _min_gru_row_backward(width, arrays, at, before, b, carry, s, grad, o, grads, to, positive)
            else:
                _min_lstm_row_backward(width, arrays, at, before, b, carry, s, grad, o, grads, to, positive, normalize)


def _rows(x: Tensor) -> tuple[np.ndarray, np.uint64]:
    """A (B, T, D) tensor as a flat float32 array and its row stride; copies only what is not already laid out so."""
    x = x.detach().float()
    # Two halves of one projection are read in place, with the whole's row stride.
    if x.stride(2) != 1 or x.stride(0) != x.shape[1] * x.stride(1):
        x = x.contiguous()
    rows, stride = x.shape[0] * x.shape[1], x.stride(1)
    # To the end of the last row, beyond which a whole stride may leave the storage.
    return x.as_strided(((rows - 1) * stride + x.shape[2],), (1,)).numpy(), U(stride)


def _arguments(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
):
    name, *options = gates.split("+")
    kind = {"linear": _LINEAR, "min_gru": _MIN_GRU, "min_lstm": _MIN_LSTM}[name]
    batch, time, channels = inputs[0].shape
    offsets = np.arange(batch + 1) * time if cu_seqlens is None else cu_seqlens.numpy()
    sequences = len(offsets) - 1
    rows = tuple(_rows(x) for x in [*inputs, inputs[0]][:3])  # the third is not read where there are two
    # A thread walks whole rows, which prefetches best, while there are sequences for every thread. Else rows are split,
    # at cache lines, except where memory is all that counts (docs/log.md, 2026-11-22).
    strips = 1 if kind == _LINEAR else max(1, -(-torch.get_num_threads() // max(sequences, 1)))
    strip = -(-channels // strips // 16) * 16
    h0 = np.zeros(sequences * channels, np.float32) if h0 is None else flat(h0)
    mask = np.empty(0, np.bool_) if mask is None else mask.reshape(-1).bool().numpy()
    cell = _Cell(kind, "g" in options, "normalize" in options)
    return cell, (U(channels), U(strip)), rows, _Layout(mask, offsets.astype(np.uint64), reverse), h0


def scan(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `op.scan`."""
    cell, sizes, rows, layout, first = _arguments(gates, inputs, h0, mask, cu_seqlens, reverse)
    h, last = empty(*inputs[0].shape), empty(len(layout.offsets) - 1, inputs[0].shape[2])
    run(_forward, cell, sizes, rows, layout, first, flat(h), flat(last))
    return h.to(inputs[0].dtype), last


def scan_backward(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    grad: Tensor,
    grad_last: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `op.scan_backward`."""
    cell, sizes, rows, layout, first = _arguments(gates, inputs, h0, mask, cu_seqlens, reverse)
    batch, time, channels = h.shape
    grads = empty(batch, time, len(inputs), channels)
    grad_h0 = grad_last.float().clone(memory_format=torch.contiguous_format)
    run(_backward, cell, sizes, rows, layout, first, flat(h), flat(grad), flat(grads), flat(grad_h0))
    return grads.to(inputs[0].dtype), grad_h0
