"""Triton backend for NVIDIA and AMD GPUs: one kernel a direction, the state in registers from first step to last.

Rows are time steps. A program is one warp: it owns BD channels of one sequence, or of one chunk of it, and takes the
rows in blocks of STEPS, whose loads are all on their way before the first is used. Within a block steps are taken one
after the other, as in `reference.py`: as long as time is not cut, padding and packing change no bit, and the compiled
code has half the instructions per element of one with `tl.associative_scan` over a tile of rows.

Where sequences times channel blocks are too few warps for the GPU, time is cut into chunks: `_aggregate` composes the
steps of every chunk into one map, `_chain` scans these maps, and the same forward or backward kernel then takes each
chunk as a sequence that starts from its link of the chain. Inputs are read twice, but by the whole GPU.

A map is a pair (u, v): h -> h - u * h + v, with u = 1 - keep straight from the sigmoid, because keep = 0.9997 alone,
rounded, would cost a relative error of 1e-4 in 1 - keep. For "linear" it is (a, b): h -> a * h + b.

The number of sequences, their lengths and the chunks are run-time arguments on which nothing is specialised.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# 4 channels a thread, loaded as 8 bytes of bfloat16. More rows at once cost occupancy on NVIDIA, spilled scalar
# registers on AMD. 16 warps, with 2 KiB each on its way to them, cover bandwidth times latency of a multiprocessor
# (4.3 TB/s * 0.7 us / 132 = 23 KiB); a step back loads twice as much, so half as many are taken at once.
BD, STEPS, STEPS_BACK = 128, 4, 2
WARPS = 16  # on every processor, where chunks can make them
SHORTEST = 64  # rows of a chunk
CHAIN_BT, CHAIN_BD = 64, 32

# By default a 1, and a multiple of 16, would each be compiled for anew: other T and B must compile nothing. A mask, or
# offsets, may be a slice that begins anywhere.
# Arguments come one by one: in a tuple they could have neither a type of their own (int64) nor be left unspecialised.
_jit = triton.jit(
    do_not_specialize=["time", "rows", "sequences", "chunk", "chunks"],
    do_not_specialize_on_alignment=["mask", "offsets"],
)


@triton.jit
def _apply(u, v, state, LINEAR: tl.constexpr):
    if LINEAR:
        state = u * state + v
    else:  # halves, because the difference of two large values may overflow; scaling by 2 is exact
        half = 0.5 * state
        state = 2 * (half + (0.5 * v - u * half))
    return state


@triton.jit
def _compose_linear(u1, v1, u2, v2):
    return u1 * u2, _apply(u2, v2, v1, True)


@triton.jit
def _compose_gated(u1, v1, u2, v2):
    return u1 + (u2 - u1 * u2), _apply(u2, v2, v1, False)


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both free of cancellation and, since e^-|x| <= 1, of overflow."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def _shares(forget, input_):
    """f / (f + i) and i / (f + i) for f, i = sigmoid of the arguments, without the underflow of f + i.

    i : f = (1 + e^-|forget|) : (1 + e^-|input|) * e^s with s = relu(-input) - relu(-forget); both sides are divided
    by e^s where s > 0, so that nothing overflows.
    """
    s = tl.where(input_ < 0, -input_, 0.0) - tl.where(forget < 0, -forget, 0.0)
    scale = tl.exp(-tl.abs(s))
    i = (1.0 + tl.exp(-tl.abs(forget))) * tl.where(s > 0, scale, 1.0)
    f = (1.0 + tl.exp(-tl.abs(input_))) * tl.where(s > 0, 1.0, scale)
    one = 1.0 / (f + i)
    return f * one, i * one


@triton.jit
def _gates(x, y, GRU: tl.constexpr, NORMALIZE: tl.constexpr):
    """(keep, drop, share): h_t = keep * h_{t-1} + share * candidate, with drop = 1 - keep free of cancellation."""
    if GRU:
        share, keep = _sigmoids(x)
        drop = share
    elif NORMALIZE:
        keep, share = _shares(x, y)
        drop = share
    else:
        keep, drop = _sigmoids(x)
        share, _ = _sigmoids(y)
    return keep, drop, share


@triton.jit
def _candidate(x, POSITIVE: tl.constexpr):
    """g(x) and its slope, or x and 1."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if POSITIVE:
        s, not_s = _sigmoids(x)
        slope = tl.where(x >= 0, slope, s * not_s)
        x = tl.where(x >= 0, x + 0.5, s)
    return x, slope


@triton.jit
def _map(x, y, z, LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr):
    """A step h_{t-1} -> h_t as (u, v), from its two or three inputs."""
    u, v = x.to(tl.float32), y.to(tl.float32)
    if not LINEAR:
        _, drop, share = _gates(u, v, GRU, NORMALIZE)
        candidate, _ = _candidate(v if GRU else z.to(tl.float32), POSITIVE)
        u, v = drop, share * candidate
    return u, v


@triton.jit
def _map_back(x, y, grad, LINEAR: tl.constexpr, GRU: tl.constexpr, NORMALIZE: tl.constexpr):
    """A step of the backward pass, e -> keep_t * (grad_t + e), as (u, v)."""
    u, grad = x.to(tl.float32), grad.to(tl.float32)
    v = u * grad
    if not LINEAR:
        _, u, _ = _gates(u, y.to(tl.float32), GRU, NORMALIZE)
        v = grad - u * grad
    return u, v


@triton.jit
def _task(offsets, time, rows, sequences, chunk, channels, BD: tl.constexpr):
    """What this program works on: its channels; sequence n, that begins at row `start`; of this the chunk c, rows
    low <= t < high; whether the sequence ends there; and the row that a sequence read backwards has in row 0's place.

    Read backwards (`_turned`) rows are counted as they are read: the sequence's last one is its first.
    """
    blocks = tl.cdiv(channels, BD)
    task = tl.program_id(0)
    # int64 from here on: n * time * channels passes 2^31.
    n = ((task // blocks) % sequences).to(tl.int64)
    c = (task // blocks // sequences).to(tl.int64)
    if offsets is None:
        start = n * time
        stop = start + time
    else:  # clamped, so that wrong offsets read wrong rows but never a wrong address
        start = tl.minimum(tl.maximum(tl.load(offsets + n).to(tl.int64), 0), rows)
        stop = tl.minimum(tl.maximum(tl.load(offsets + n + 1).to(tl.int64), start), rows)
    low = start + c * chunk
    high = tl.minimum(low + chunk, stop)
    # Of an empty sequence the first chunk ends it, and writes its initial state as the last.
    ends = (high == stop) & ((low < stop) | (c == 0))
    return (task % blocks) * BD + tl.arange(0, BD), n, c, start, low, high, ends, start + stop - 1


@triton.jit
def _turned(x, stride, zeroth, REVERSE: tl.constexpr):
    """A tensor's row 0 and the distance to the next one, or, from the end of a sequence, to the one before."""
    if REVERSE:
        x += zeroth * stride
        stride = -stride
    return x, stride


@triton.jit
def _live(mask, row, inside, zeroth, REVERSE: tl.constexpr):
    """Whether a row moves the state: inside the chunk and not padding."""
    if mask is not None:
        mask, step = _turned(mask, 1, zeroth, REVERSE)
        inside = inside & (tl.load(mask + row * step, inside, other=0) != 0)
    return inside


@triton.jit
def _step(
    x, y, z, state, lost,
    LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The next state, and what its rounding lost, to be handed to the next step.

    A slow gate adds a little to a lot, thousands of times: `lost` carries the rounding error along (Kahan).
    """
    if LINEAR:
        state = x * state + y
    else:
        keep, drop, share = _gates(x, y, GRU, NORMALIZE)
        candidate, _ = _candidate(y if GRU else z, POSITIVE)
        half, half_v = 0.5 * state, 0.5 * share * candidate  # halves as in `_apply`
        step = half_v - drop * half - lost
        slow = half + step
        is_slow = drop < 0.5
        state = 2 * tl.where(is_slow, slow, keep * half + half_v)
        lost = tl.where(is_slow, (slow - half) - step, 0.0)
    return state, lost


@_jit
def _forward(
    x, y, z, mask, offsets, x_stride, y_stride, z_stride,
    time: tl.int64, rows: tl.int64, sequences, chunk: tl.int64, chunks, channels,
    states, h, last,
    LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr,
    BD: tl.constexpr, STEPS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """`states` (N, chunks, D): the state before every chunk. Writes h and, where a sequence ends, `last` (N, D)."""
    channel, n, c, _, low, high, ends, zeroth = _task(offsets, time, rows, sequences, chunk, channels, BD)
    x, x_stride = _turned(x, x_stride, zeroth, REVERSE)
    y, y_stride = _turned(y, y_stride, zeroth, REVERSE)
    z, z_stride = _turned(z, z_stride, zeroth, REVERSE)
    h, h_stride = _turned(h, channels, zeroth, REVERSE)
    valid = channel < channels
    state = tl.load(states + (n * chunks + c) * channels + channel, valid, other=0.0)
    lost = tl.zeros_like(state)
    for row in range(low, high, STEPS):
        xs, ys, zs, lives = (), (), (), ()
        x_row, y_row, z_row = x + row * x_stride + channel, y + row * y_stride + channel, z + row * z_stride + channel
        # All loads before the first use: a warp alone must keep that many bytes on their way.
        for j in tl.static_range(STEPS):
            inside = valid & (row + j < high)
            xs = xs + (tl.load(x_row + j * x_stride, inside, other=0.0),)
            ys = ys + (tl.load(y_row + j * y_stride, inside, other=0.0),)
            # What there is no third input for must be a tensor still; it is not read.
            zs = zs + (xs[j] if LINEAR or GRU else tl.load(z_row + j * z_stride, inside, other=0.0),)
            lives = lives + (_live(mask, row + j, row + j < high, zeroth, REVERSE),)
        h_row = h + row * h_stride + channel
        for j in tl.static_range(STEPS):
            next_state, next_lost = _step(
                xs[j].to(tl.float32), ys[j].to(tl.float32), zs[j].to(tl.float32), state, lost,
                LINEAR, GRU, POSITIVE, NORMALIZE,
            )  # fmt: skip
            # A choice and no branch, so that a step costs the same with padding and rounds the same.
            state, lost = tl.where(lives[j], next_state, state), tl.where(lives[j], next_lost, lost)
            tl.store(h_row + j * h_stride, state, valid & (row + j < high))
    tl.store(last + n * channels + channel, state, valid & ends)


@_jit
def _backward(
    x, y, z, mask, offsets, x_stride, y_stride, z_stride,
    time: tl.int64, rows: tl.int64, sequences, chunk: tl.int64, chunks, channels,
    states, h0, h, grad, grad_stride, grads, grad_h0,
    LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr,
    BD: tl.constexpr, STEPS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Walks back in time: dh_t = grad_t + e, then e = keep_t * dh_t; the last e is the gradient of h0.

    `states` (N, chunks, D): e after every chunk, the last chunk first. Writes `grads` (B, T, inputs, D) and `grad_h0`.
    """
    channel, n, c, start, low, high, _, zeroth = _task(offsets, time, rows, sequences, chunk, channels, BD)
    valid = channel < channels
    count: tl.constexpr = 2 if LINEAR or GRU else 3
    x, x_stride = _turned(x, x_stride, zeroth, REVERSE)
    y, y_stride = _turned(y, y_stride, zeroth, REVERSE)
    z, z_stride = _turned(z, z_stride, zeroth, REVERSE)
    h, h_stride = _turned(h, channels, zeroth, REVERSE)
    grad, grad_stride = _turned(grad, grad_stride, zeroth, REVERSE)
    grads, grads_stride = _turned(grads, count * channels, zeroth, REVERSE)
    e = tl.load(states + (n * chunks + (chunks - 1 - c)) * channels + channel, valid, other=0.0)
    for back in range(0, high - low, STEPS):
        row = high - 1 - back
        xs, ys, zs, befores, gradients, lives = (), (), (), (), (), ()
        x_row, y_row, z_row = x + row * x_stride + channel, y + row * y_stride + channel, z + row * z_stride + channel
        h_row, grad_row = h + row * h_stride + channel, grad + row * grad_stride + channel
        for j in tl.static_range(STEPS):
            inside = valid & (row - j >= low)
            xs = xs + (tl.load(x_row - j * x_stride, inside, other=0.0),)
            ys = ys + (tl.load(y_row - j * y_stride, inside, other=0.0),)
            zs = zs + (xs[j] if LINEAR or GRU else tl.load(z_row - j * z_stride, inside, other=0.0),)
            # h_{t-1} from what the forward pass wrote, rounded to its dtype; only h0 is float32.
            befores = befores + (tl.load(h_row - (j + 1) * h_stride, inside & (row - j > start), other=0.0),)
            gradients = gradients + (tl.load(grad_row - j * grad_stride, inside, other=0.0),)
            lives = lives + (_live(mask, row - j, row - j >= low, zeroth, REVERSE),)
        to = grads + row * grads_stride + channel
        for j in tl.static_range(STEPS):
            before = befores[j].to(tl.float32)
            # Uniform in the program: no lanes wait for others.
            if row - j == start:
                before = tl.load(h0 + n * channels + channel, valid, other=0.0)
            e = _step_back(
                xs[j].to(tl.float32), ys[j].to(tl.float32), zs[j].to(tl.float32), before,
                gradients[j].to(tl.float32) + e, lives[j],
                to - j * grads_stride, channels, valid & (row - j >= low), LINEAR, GRU, POSITIVE, NORMALIZE,
            )  # fmt: skip
    tl.store(grad_h0 + n * channels + channel, e, valid & (c == 0))


@triton.jit
def _step_back(
    x, y, z, before, dh, live, to, channels, inside,
    LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of one row's inputs, side by side from `to` on; returns that of the state before it."""
    if LINEAR:
        e = x * dh
        tl.store(to, tl.where(live, dh * before, 0.0), inside)
        tl.store(to + channels, tl.where(live, dh, 0.0), inside)
    else:
        keep, drop, share = _gates(x, y, GRU, NORMALIZE)
        candidate, slope = _candidate(y if GRU else z, POSITIVE)
        e = tl.where(drop < 0.5, dh - drop * dh, keep * dh)  # whichever of the two was not rounded near 1
        _, not_x = _sigmoids(x)
        _, not_y = _sigmoids(y)
        # halves, because the difference of two large values may overflow
        grad_ratio = dh * ((2 * share * keep) * (0.5 * candidate - 0.5 * before))
        if GRU:
            tl.store(to, tl.where(live, grad_ratio, 0.0), inside)
            tl.store(to + channels, tl.where(live, dh * share * slope, 0.0), inside)
        else:
            grad_forget = -grad_ratio * not_x if NORMALIZE else dh * (before * (drop * keep))
            grad_input = grad_ratio * not_y if NORMALIZE else dh * (candidate * (share * not_y))
            tl.store(to, tl.where(live, grad_forget, 0.0), inside)
            tl.store(to + channels, tl.where(live, grad_input, 0.0), inside)
            tl.store(to + 2 * channels, tl.where(live, dh * share * slope, 0.0), inside)
    return tl.where(live, e, dh)


@_jit
def _aggregate(
    x, y, z, mask, offsets, x_stride, y_stride, z_stride,
    time: tl.int64, rows: tl.int64, sequences, chunk: tl.int64, chunks, channels,
    grad, grad_stride, us, vs,
    LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr,
    BD: tl.constexpr, STEPS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Every chunk as one map `us`, `vs` (N, chunks, D); with `grad` that of the backward pass, the last chunk first."""
    channel, n, c, _, low, high, _, zeroth = _task(offsets, time, rows, sequences, chunk, channels, BD)
    valid = channel < channels
    x, x_stride = _turned(x, x_stride, zeroth, REVERSE)
    y, y_stride = _turned(y, y_stride, zeroth, REVERSE)
    z, z_stride = _turned(z, z_stride, zeroth, REVERSE)
    if grad is not None:
        grad, grad_stride = _turned(grad, grad_stride, zeroth, REVERSE)
    # The map that changes nothing.
    u = tl.full([BD], 1.0 if LINEAR else 0.0, tl.float32)
    v = tl.full([BD], 0.0, tl.float32)
    for done in range(0, high - low, STEPS):
        xs, ys, zs, lives = (), (), (), ()
        for j in tl.static_range(STEPS):
            row = low + done + j if grad is None else high - 1 - done - j
            inside = valid & (done + j < high - low)
            xs = xs + (tl.load(x + row * x_stride + channel, inside, other=0.0),)
            if grad is None:
                ys = ys + (tl.load(y + row * y_stride + channel, inside, other=0.0),)
                zs = zs + (xs[j] if LINEAR or GRU else tl.load(z + row * z_stride + channel, inside, other=0.0),)
            else:
                # Backward the candidate plays no part, and the input gate only where it is normalised.
                ys = ys + (tl.load(y + row * y_stride + channel, inside, other=0.0) if NORMALIZE else xs[j],)
                zs = zs + (tl.load(grad + row * grad_stride + channel, inside, other=0.0),)
            lives = lives + (_live(mask, row, done + j < high - low, zeroth, REVERSE),)
        for j in tl.static_range(STEPS):
            if grad is None:
                next_u, next_v = _map(xs[j], ys[j], zs[j], LINEAR, GRU, POSITIVE, NORMALIZE)
                next_u = tl.where(lives[j], next_u, 1.0 if LINEAR else 0.0)
                next_v = tl.where(lives[j], next_v, 0.0)
            else:  # padding keeps the state but has an output, and so a gradient
                next_u, next_v = _map_back(xs[j], ys[j], zs[j], LINEAR, GRU, NORMALIZE)
                next_u = tl.where(lives[j], next_u, 1.0 if LINEAR else 0.0)
                next_v = tl.where(lives[j], next_v, zs[j].to(tl.float32))
            if LINEAR:
                u, v = _compose_linear(u, v, next_u, next_v)
            else:
                u, v = _compose_gated(u, v, next_u, next_v)
    at = (n * chunks + (c if grad is None else chunks - 1 - c)) * channels + channel
    tl.store(us + at, u, valid)
    tl.store(vs + at, v, valid)


@_jit
def _chain(us, vs, first, states, chunks, channels, LINEAR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """From the state before the first chunk (N, D) and one map for each (N, chunks, D) to the state before each."""
    blocks = tl.cdiv(channels, BD)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    valid = channel < channels
    state = tl.load(first + n * channels + channel, valid, other=0.0)
    tl.store(states + n * chunks * channels + channel, state, valid)
    # The last chunk's map leads to no other chunk.
    for begin in range(0, chunks - 1, BT):
        c = begin + tl.arange(0, BT)
        inside = (c < chunks - 1)[:, None] & valid[None, :]
        at = (n * chunks + c)[:, None] * channels + channel[None, :]
        u = tl.load(us + at, inside, other=1.0 if LINEAR else 0.0)
        v = tl.load(vs + at, inside, other=0.0)
        if LINEAR:
            u, v = tl.associative_scan((u, v), 0, _compose_linear)
        else:
            u, v = tl.associative_scan((u, v), 0, _compose_gated)
        after = _apply(u, v, state[None, :], LINEAR)
        tl.store(states + at + channels, after, inside)
        # The last row of a tile, which cannot be indexed.
        state = tl.sum(tl.where(tl.arange(0, BT)[:, None] == BT - 1, after, 0.0), 0)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the GPU; 1 where there is none, as in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _chunks(time: int, warps: int, processors: int) -> tuple[int, int]:
    """Length and number of chunks for sequences of up to `time` steps that make `warps` programs without chunks."""
    if 2 * warps > WARPS * processors or time < 2 * SHORTEST:  # reading the inputs twice would cost more than it gains
        return time, 1
    # Chunks of whole blocks of STEPS, as many as fill the GPU, none below SHORTEST.
    wanted = min(-(-WARPS * processors // warps), time // SHORTEST)
    length = -(-time // wanted // STEPS) * STEPS
    return length, -(-time // length)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """A (B, T, D) tensor and the distance of its rows; copies only what has no such constant distance."""
    batch, time, channels = x.shape
    stride = x.stride(1) if time > 1 else x.stride(0)
    if (x.stride(2) == 1 or channels == 1) and (batch == 1 or x.stride(0) == time * stride):
        return x, stride
    return x.contiguous(), channels


class _Launch:
    """The arguments that the kernels of one scan share."""

    def __init__(self, gates: str, inputs: list[Tensor], mask: Tensor | None, cu_seqlens: Tensor | None, reverse: bool):
        name, *options = gates.split("+")
        batch, time, self.channels = inputs[0].shape
        self.device = inputs[0].device
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.blocks = triton.cdiv(self.channels, BD)
        # How long packed sequences are only the GPU knows: chunks are counted for the longest possible, many are empty.
        chunk, self.chunks = _chunks(time, self.sequences * self.blocks, _processors(self.device))
        (x, x_stride), (y, y_stride), (z, z_stride) = [_rows(i) for i in [*inputs, inputs[0]][:3]]
        # None is a constant to Triton: without a mask no load of it is compiled.
        mask = None if mask is None else mask.bool().contiguous()
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.shared = (
            x, y, z, mask, offsets, x_stride, y_stride, z_stride,
            time, batch * time, self.sequences, chunk, self.chunks, self.channels,
        )  # fmt: skip
        self.linear = name == "linear"
        self.constants = {
            "LINEAR": self.linear, "GRU": name == "min_gru", "POSITIVE": "g" in options,
            "NORMALIZE": "normalize" in options, "BD": BD, "REVERSE": reverse, "num_warps": 1,
        }  # fmt: skip

    def run(self, kernel, *arguments) -> None:
        # A step back holds twice the inputs.
        steps = STEPS_BACK if kernel is _backward else STEPS
        kernel[(self.sequences * self.chunks * self.blocks,)](*self.shared, *arguments, **self.constants, STEPS=steps)

    def zeros(self) -> Tensor:
        return torch.zeros(self.sequences, self.channels, device=self.device)

    def states(self, first: Tensor, grad: Tensor | None = None, grad_stride: int = 0) -> Tensor:
        """The state before each chunk (N, chunks, D), `first` (N, D) before the first; with `grad`, backward."""
        if self.chunks == 1:
            return first
        u, v, states = torch.empty(3, self.sequences, self.chunks, self.channels, device=self.device)
        self.run(_aggregate, grad, grad_stride, u, v)
        grid = (self.sequences * triton.cdiv(self.channels, CHAIN_BD),)
        _chain[grid](u, v, first, states, self.chunks, self.channels, LINEAR=self.linear, BT=CHAIN_BT, BD=CHAIN_BD)
        return states


def scan(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `op.scan`."""
    with torch.cuda.device_of(inputs[0]):
        launch = _Launch(gates, inputs, mask, cu_seqlens, reverse)
        first = launch.zeros() if h0 is None else h0.float().contiguous()
        h = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=launch.device)
        last = torch.empty(first.shape, device=launch.device)
        launch.run(_forward, launch.states(first), h, last)
    return h, last


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
    batch, time, channels = h.shape
    with torch.cuda.device_of(inputs[0]):
        launch = _Launch(gates, inputs, mask, cu_seqlens, reverse)
        first = launch.zeros() if h0 is None else h0.float().contiguous()
        grad, grad_stride = _rows(grad)
        states = launch.states(grad_last.float().contiguous(), grad, grad_stride)
        grads = torch.empty(batch, time, len(inputs), channels, dtype=inputs[0].dtype, device=launch.device)
        grad_h0 = torch.empty(first.shape, device=launch.device)
        launch.run(_backward, states, first, h.contiguous(), grad, grad_stride, grads, grad_h0)
    return grads, grad_h0
