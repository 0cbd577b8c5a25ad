"""Triton backend for NVIDIA and AMD GPUs: one kernel a direction that walks tiles of time with the state in registers.

Rows are time steps. A program owns BD channels of one sequence, or of one chunk of it, and scans [BT, BD] tiles along
time. Gated recurrences are scanned as pairs (u, v), each the map h -> h - u * h + v with u = 1 - keep straight from
the sigmoid: keep = 0.9997 alone, rounded, would cost a relative error of 1e-4 in 1 - keep. "linear" scans (a, b), the
map h -> a * h + b.

Where sequences times channel blocks are too few programs for the GPU, time is cut into chunks: `_aggregate` reduces
every chunk to one map, `_chain` runs these maps over the chunks, and the same forward or backward kernel then takes
each chunk as a sequence that starts from its link of the chain. The inputs are read twice, but by the whole GPU.

The number of sequences, their lengths and the chunks are run-time arguments that nothing is specialised on.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# 32 x 64 keeps the backward of the normalised minLSTM, with seven tiles alive, in registers on every target; a row of
# bfloat16 is then one cache line of 128 bytes. STAGES tiles are loaded ahead of the one at work.
BT, BD, WARPS, STAGES = 32, 64, 4, 3
_RUNTIME = ["time", "rows", "sequences", "chunk", "chunks"]
_jit = triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["mask", "offsets"])


@triton.jit
def _compose_linear(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _compose_gated(u1, v1, u2, v2):
    # v1 - u2 * v1 first: for shares of one gate no partial result exceeds the states, so none overflows.
    return u1 + (u2 - u1 * u2), (v1 - u2 * v1) + v2


@triton.jit
def _prefixes(u, v, LINEAR: tl.constexpr):
    """Per row of a [BT, BD] tile of maps, the composition of all maps up to it."""
    if LINEAR:
        u, v = tl.associative_scan((u, v), 0, _compose_linear)
    else:
        u, v = tl.associative_scan((u, v), 0, _compose_gated)
    return u, v


@triton.jit
def _apply(u, v, state, LINEAR: tl.constexpr):
    return u * state + v if LINEAR else (state - u * state) + v


@triton.jit
def _last_row(x, BT: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BT)[:, None] == BT - 1, x, 0.0), 0)


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

    i : f = (1 + e^-|forget|) : (1 + e^-|input|) * e^s with s = relu(-input) - relu(-forget), both sides of which are
    divided by e^s where s > 0.
    """
    s = tl.where(input_ < 0, -input_, 0.0) - tl.where(forget < 0, -forget, 0.0)
    scale = tl.exp(-tl.abs(s))
    i = (1.0 + tl.exp(-tl.abs(forget))) * tl.where(s > 0, scale, 1.0)
    f = (1.0 + tl.exp(-tl.abs(input_))) * tl.where(s > 0, 1.0, scale)
    total = 1.0 / (f + i)
    return f * total, i * total


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
    if POSITIVE:
        below, above = _sigmoids(x)
        return tl.where(x >= 0, x + 0.5, below), tl.where(x >= 0, 1.0, below * above)
    return x, x * 0 + 1.0


@triton.jit
def _program(offsets, time, rows, sequences, chunk, channels, BD: tl.constexpr):
    """What this program works on: sequence n, its first row, the rows low <= t < high of its chunk c, whether the
    sequence ends there, and its channels."""
    blocks = tl.cdiv(channels, BD)
    task = tl.program_id(0)
    n = (task // blocks) % sequences
    c = task // blocks // sequences
    if offsets is None:
        start = n * time
        stop = start + time
    else:  # clamped, so that wrong offsets give wrong numbers rather than a wrong address
        start = tl.minimum(tl.maximum(tl.load(offsets + n).to(tl.int64), 0), rows)
        stop = tl.minimum(tl.maximum(tl.load(offsets + n + 1).to(tl.int64), start), rows)
    low = start + c * chunk
    high = tl.minimum(low + chunk, stop)
    ends = (high == stop) & ((low < stop) | (c == 0))
    channel = (task % blocks) * BD + tl.arange(0, BD)
    return n.to(tl.int64), c.to(tl.int64), start, low, high, ends, channel


@triton.jit
def _load(x, row, stride, channel, inside):
    return tl.load(x + row[:, None] * stride + channel[None, :], inside, other=0.0).to(tl.float32)


@triton.jit
def _live(mask, row, inside):
    """Whether a step moves the state: inside the sequence and not padding."""
    if mask is not None:
        inside &= (tl.load(mask + row, inside, other=0) != 0)
    return inside


@triton.jit
def _maps(x, y, z, live, LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr):
    """Steps of a tile as maps (u, v), the identity where not `live`."""
    if LINEAR:
        return tl.where(live, x, 1.0), tl.where(live, y, 0.0)
    keep, drop, share = _gates(x, y, GRU, NORMALIZE)
    candidate, _ = _candidate(y if GRU else z, POSITIVE)
    return tl.where(live, drop, 0.0), tl.where(live, share * candidate, 0.0)


@triton.jit
def _reverse_maps(x, y, grad, live, LINEAR: tl.constexpr, GRU: tl.constexpr, NORMALIZE: tl.constexpr):
    """Steps of the backward pass as maps: e -> keep_t * (e + grad_t), or e -> e + grad_t where not `live`."""
    if LINEAR:
        u = tl.where(live, x, 1.0)
        return u, u * grad
    keep, drop, share = _gates(x, y, GRU, NORMALIZE)
    u = tl.where(live, drop, 0.0)
    return u, grad - u * grad


@_jit
def _forward(
    x, y, z, mask, offsets, x_stride, y_stride, z_stride,
    time: tl.int64, rows: tl.int64, sequences, chunk: tl.int64, chunks, channels,
    states, h, last,
    LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`states` (N, chunks, D): the state before every chunk. Writes h and, where a sequence ends, `last` (N, D)."""
    n, c, start, low, high, ends, channel = _program(offsets, time, rows, sequences, chunk, channels, BD)
    valid = channel < channels
    state = tl.load(states + (n * chunks + c) * channels + channel, valid, other=0.0)
    for tile in tl.range(0, tl.cdiv(high - low, BT).to(tl.int32), num_stages=STAGES):
        row = low + tile * BT + tl.arange(0, BT)
        inside = (row < high)[:, None] & valid[None, :]
        x_t = _load(x, row, x_stride, channel, inside)
        y_t = _load(y, row, y_stride, channel, inside)
        z_t = x_t if LINEAR or GRU else _load(z, row, z_stride, channel, inside)
        live = _live(mask, row, row < high)[:, None]
        u, v = _prefixes(*_maps(x_t, y_t, z_t, live, LINEAR, GRU, POSITIVE, NORMALIZE), LINEAR)
        h_t = _apply(u, v, state, LINEAR)
        tl.store(h + row[:, None] * channels + channel[None, :], h_t, inside)
        state = _last_row(h_t, BT)  # rows after the last step are identities: the last row always holds the state
    tl.store(last + n * channels + channel, state, valid & ends)


@_jit
def _backward(
    x, y, z, mask, offsets, x_stride, y_stride, z_stride,
    time: tl.int64, rows: tl.int64, sequences, chunk: tl.int64, chunks, channels,
    states, h0, h, grad, grad_stride, grads, grad_h0,
    LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walks back in time with e_t = keep_t * dh_t, where dh_t = grad_t + e_{t+1}; the last e is the gradient of h0.

    `states` (N, chunks, D): e after every chunk, the last chunk first.
    """
    n, c, start, low, high, ends, channel = _program(offsets, time, rows, sequences, chunk, channels, BD)
    valid = channel < channels
    state = tl.load(states + (n * chunks + (chunks - 1 - c)) * channels + channel, valid, other=0.0)
    first = tl.load(h0 + n * channels + channel, valid, other=0.0)
    count: tl.constexpr = 2 if LINEAR or GRU else 3
    step = tl.arange(0, BT)
    for tile in tl.range(0, tl.cdiv(high - low, BT).to(tl.int32), num_stages=STAGES):
        row = high - 1 - (tile * BT + step)
        inside = (row >= low)[:, None] & valid[None, :]
        x_t = _load(x, row, x_stride, channel, inside)
        y_t = _load(y, row, y_stride, channel, inside)
        z_t = x_t if LINEAR or GRU else _load(z, row, z_stride, channel, inside)
        grad_t = _load(grad, row, grad_stride, channel, inside)
        before = _load(h, row - 1, channels, channel, inside & (row > start)[:, None])
        before = tl.where(row[:, None] == start, first[None, :], before)
        live = _live(mask, row, row >= low)[:, None]

        u, v = _prefixes(*_reverse_maps(x_t, y_t, grad_t, live, LINEAR, GRU, NORMALIZE), LINEAR)
        e = _apply(u, v, state, LINEAR)
        later = tl.gather(e, tl.broadcast_to(tl.maximum(step - 1, 0)[:, None], e.shape), 0)
        dh = tl.where(live, grad_t + tl.where(step[:, None] == 0, state[None, :], later), 0.0)
        state = _last_row(e, BT)

        to = grads + row[:, None] * (count * channels) + channel[None, :]
        if LINEAR:
            tl.store(to, dh * before, inside)
            tl.store(to + channels, dh, inside)
        else:
            keep, drop, share = _gates(x_t, y_t, GRU, NORMALIZE)
            candidate, slope = _candidate(y_t if GRU else z_t, POSITIVE)
            tl.store(to + (count - 1) * channels, tl.where(live, dh * share * slope, 0.0), inside)
            if GRU or NORMALIZE:  # halves, because the difference of two large values may overflow
                grad_ratio = dh * ((2 * share * keep) * (0.5 * candidate - 0.5 * before))
                if GRU:
                    tl.store(to, tl.where(live, grad_ratio, 0.0), inside)
                else:
                    _, not_forget = _sigmoids(x_t)
                    _, not_input = _sigmoids(y_t)
                    tl.store(to, tl.where(live, -grad_ratio * not_forget, 0.0), inside)
                    tl.store(to + channels, tl.where(live, grad_ratio * not_input, 0.0), inside)
            else:
                _, not_input = _sigmoids(y_t)
                tl.store(to, tl.where(live, dh * (before * (drop * keep)), 0.0), inside)
                tl.store(to + channels, tl.where(live, dh * (candidate * (share * not_input)), 0.0), inside)
    tl.store(grad_h0 + n * channels + channel, state, valid & (c == 0))


@_jit
def _aggregate(
    x, y, z, mask, offsets, x_stride, y_stride, z_stride,
    time: tl.int64, rows: tl.int64, sequences, chunk: tl.int64, chunks, channels,
    grad, grad_stride, u_out, v_out,
    LINEAR: tl.constexpr, GRU: tl.constexpr, POSITIVE: tl.constexpr, NORMALIZE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every chunk as one map (u, v), each (N, chunks, D): forward, or back in time and last chunk first if `grad`."""
    n, c, start, low, high, ends, channel = _program(offsets, time, rows, sequences, chunk, channels, BD)
    valid = channel < channels
    total_u = tl.full([BD], 1.0 if LINEAR else 0.0, tl.float32)
    total_v = tl.full([BD], 0.0, tl.float32)
    for tile in tl.range(0, tl.cdiv(high - low, BT).to(tl.int32), num_stages=STAGES):
        step = tile * BT + tl.arange(0, BT)
        row = low + step if grad is None else high - 1 - step
        inside = (step < high - low)[:, None] & valid[None, :]
        live = _live(mask, row, step < high - low)[:, None]
        x_t = _load(x, row, x_stride, channel, inside)
        if grad is None:
            y_t = _load(y, row, y_stride, channel, inside)
            z_t = x_t if LINEAR or GRU else _load(z, row, z_stride, channel, inside)
            u, v = _maps(x_t, y_t, z_t, live, LINEAR, GRU, POSITIVE, NORMALIZE)
        else:
            y_t = _load(y, row, y_stride, channel, inside) if NORMALIZE else x_t
            grad_t = _load(grad, row, grad_stride, channel, inside)
            u, v = _reverse_maps(x_t, y_t, grad_t, live, LINEAR, GRU, NORMALIZE)
        u, v = _prefixes(u, v, LINEAR)
        u, v = _last_row(u, BT), _last_row(v, BT)
        if LINEAR:
            total_u, total_v = _compose_linear(total_u, total_v, u, v)
        else:
            total_u, total_v = _compose_gated(total_u, total_v, u, v)
    at = (n * chunks + (c if grad is None else chunks - 1 - c)) * channels + channel
    tl.store(u_out + at, total_u, valid)
    tl.store(v_out + at, total_v, valid)


@_jit
def _chain(u, v, first, states, chunks, channels, LINEAR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """From `first` (N, D) and a map for each chunk (N, chunks, D) to the state before each chunk (N, chunks, D)."""
    blocks = tl.cdiv(channels, BD)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    valid = channel < channels
    state = tl.load(first + n * channels + channel, valid, other=0.0)
    tl.store(states + n * chunks * channels + channel, state, valid)
    for tile in range(0, tl.cdiv(chunks - 1, BT)):
        c = tile * BT + tl.arange(0, BT)
        inside = (c < chunks - 1)[:, None] & valid[None, :]
        at = (n * chunks + c)[:, None] * channels + channel[None, :]
        u_c = tl.load(u + at, inside, other=1.0 if LINEAR else 0.0)
        v_c = tl.load(v + at, inside, other=0.0)
        u_c, v_c = _prefixes(u_c, v_c, LINEAR)
        after = _apply(u_c, v_c, state, LINEAR)
        tl.store(states + at + channels, after, inside)
        state = _last_row(after, BT)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of the GPU; 1 where there is none, as under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _chunks(time: int, programs: int, processors: int) -> tuple[int, int]:
    """Length and number of the chunks that sequences of up to `time` steps are cut into, given that many programs
    without chunks. Two programs on every processor keep enough loads in flight; chunks aim at four, for balance, but
    not below four tiles each, where the chain would cost more than it gains."""
    if programs >= 2 * processors:
        return time, 1
    wanted = min(-(-4 * processors // programs), -(-time // (4 * BT)))
    length = -(-time // wanted // BT) * BT
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

    def __init__(self, gates: str, inputs: list[Tensor], mask: Tensor | None, cu_seqlens: Tensor | None):
        name, *options = gates.split("+")
        batch, time, channels = inputs[0].shape
        self.device, self.channels = inputs[0].device, channels
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.blocks = triton.cdiv(channels, BD)
        # The longest of packed sequences is known to the GPU alone: chunks cover them all, and most are then empty.
        chunk, self.chunks = _chunks(time, self.sequences * self.blocks, _processors(self.device))
        (x, x_stride), (y, y_stride), (z, z_stride) = [_rows(i) for i in [*inputs, inputs[0]][:3]]
        mask = None if mask is None else mask.bool().contiguous()
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.shared = (x, y, z, mask, offsets, x_stride, y_stride, z_stride,
                       time, batch * time, self.sequences, chunk, self.chunks, channels)  # fmt: skip
        self.linear = name == "linear"
        self.constants = {
            "LINEAR": self.linear, "GRU": name == "min_gru", "POSITIVE": "g" in options,
            "NORMALIZE": "normalize" in options, "BT": BT, "BD": BD, "STAGES": STAGES, "num_warps": WARPS,
        }  # fmt: skip

    def run(self, kernel, *arguments) -> None:
        kernel[(self.sequences * self.chunks * self.blocks,)](*self.shared, *arguments, **self.constants)

    def states(self, first: Tensor, grad: Tensor | None = None, grad_stride: int = 0) -> Tensor:
        """The state before each chunk (N, chunks, D), `first` (N, D) before the first; in backward order if `grad`."""
        if self.chunks == 1:
            return first
        u, v, states = first.new_empty(3, self.sequences, self.chunks, self.channels)
        self.run(_aggregate, grad, grad_stride, u, v)
        _chain[(self.sequences * self.blocks,)](
            u, v, first, states, self.chunks, self.channels, LINEAR=self.linear, BT=BT, BD=BD, num_warps=WARPS
        )
        return states


def scan(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `op.scan`."""
    with torch.cuda.device_of(inputs[0]):
        launch = _Launch(gates, inputs, mask, cu_seqlens)
        first = _initial(h0, launch)
        h, last = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=launch.device), torch.empty_like(first)
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
) -> tuple[Tensor, Tensor]:
    """See `op.scan_backward`."""
    with torch.cuda.device_of(inputs[0]):
        launch = _Launch(gates, inputs, mask, cu_seqlens)
        batch, time, channels = h.shape
        grad, grad_stride = _rows(grad)
        states = launch.states(grad_last.float().contiguous(), grad, grad_stride)
        grads = torch.empty(batch, time, len(inputs), channels, dtype=inputs[0].dtype, device=launch.device)
        grad_h0 = torch.empty(launch.sequences, channels, device=launch.device)
        launch.run(
            _backward, states, _initial(h0, launch), h.contiguous(), grad, grad_stride, grads, grad_h0
        )
    return grads, grad_h0


def _initial(h0: Tensor | None, launch: _Launch) -> Tensor:
    if h0 is None:
        return torch.zeros(launch.sequences, launch.channels, device=launch.device)
    return h0.detach().float().contiguous()
