"""Tiles of the recurrence: which rows a program works on, what it loads and stores, and its matrix products.

`to` (BN, 1) says where a row begins, `unit` (1, units) is the column in it, `inside` what of the tile exists.
"""

import triton
import triton.language as tl

from hf_rnn_kernels.recurrent_scan.triton_cells import _add


@triton.jit
def _task(offsets, time, rows, sequences, heads, BN: tl.constexpr, STEP: tl.constexpr):
    """What this program works on: a head; the sequences n, the rows where they are begun, at their ends if STEP is -1,
    and their lengths; the longest of these."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    n = (tl.program_id(0) // heads).to(tl.int64) * BN + tl.arange(0, BN)
    real = n < sequences
    if offsets is None:
        start, stop = n * time, (n + 1) * time
    else:  # clamped, so that wrong offsets read wrong rows but never a wrong address
        start = tl.minimum(tl.maximum(tl.load(offsets + n, real, other=0).to(tl.int64), 0), rows)
        stop = tl.minimum(tl.maximum(tl.load(offsets + n + 1, real, other=0).to(tl.int64), start), rows)
    # Rows of the tile beyond the last sequence never live.
    length = tl.where(real, stop - start, 0).to(tl.int32)
    return head, n, start if STEP == 1 else stop - 1, length, tl.max(length, 0)


@triton.jit
def _load(tensor, to, unit, apart, inside, COUNT: tl.constexpr):
    """COUNT tiles, `apart` from each other."""
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (tl.load(tensor + (to + k * apart) + unit, inside, other=0.0),)
    return tiles


@triton.jit
def _store(tensor, to, unit, apart, inside, tiles, FIRST: tl.constexpr, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        tl.store(tensor + (to + k * apart) + unit, tiles[FIRST + k], inside)


@triton.jit
def _live(mask, row, inside):
    """Whether a row moves the state: inside its sequence and not padding."""
    if mask is not None:
        inside = inside & (tl.load(mask + row, inside, other=0) != 0)
    return inside


@triton.jit
def _bias(bias, head, size, unit, valid, GATES: tl.constexpr):
    """b, a row for each gate; zeros where there is none."""
    if bias is None:
        tiles = ()
        for _ in tl.static_range(GATES):
            tiles = tiles + (tl.zeros_like(unit).to(tl.float32),)
    else:
        tiles = _load(bias, head * GATES * size, unit, size, valid, GATES)
    return tiles


@triton.jit
def _owner(n, head, sequences, heads, rows_per_member):
    """Whose bias and factors a sequence has: its head's, or this head's of its member."""
    return head if rows_per_member is None else tl.minimum(n, sequences - 1) // rows_per_member * heads + head


@triton.jit
def _source(first, every, t, n, row, sequences, units, STATES: tl.constexpr, STEP: tl.constexpr):
    """Where the states before step t are: the tensor, the rows in it, and the distance of one state to the next.

    `first` is (STATES, N, D), `every` (B, T, STATES, D).
    """
    # Before the first step states lie by sequence, later by token.
    if t == 0:
        source, to, apart = first, n * units, sequences * units
    else:
        source, to, apart = every, (row - STEP) * STATES * units, units
    return source, to, apart


@triton.jit
def _held(weight, head, size, unit, GATES: tl.constexpr):
    """R of a head, a tile (out, in) for each gate."""
    out = tl.trans(unit)
    return _load(
        weight, head * GATES * size * size + out * size, unit, size * size, (out < size) & (unit < size), GATES
    )


@triton.jit
def _recurrent(h, weights, GATES: tl.constexpr):
    """R h, gate by gate."""
    new = ()
    for g in tl.static_range(GATES):
        # "ieee": TF32 would keep 10 bits of the state. 16-bit types multiply as they are.
        new = new + (tl.dot(h, tl.trans(weights[g]), input_precision="ieee"),)
    return new


@triton.jit
def _projected(h, right, K: tl.constexpr):
    """u_k = h . right_k."""
    u = ()
    for k in tl.static_range(K):
        u = u + (tl.sum(h.to(tl.float32) * right[k].to(tl.float32), 1, keep_dims=True),)
    return u


@triton.jit
def _add_low_rank(recurrent, u, left, GATES: tl.constexpr, K: tl.constexpr):
    """The sum over k of u_k left_k is added, gate by gate; `left` has the gates of one k after those of another."""
    for k in tl.static_range(K):
        new = ()
        for g in tl.static_range(GATES):
            new = new + (recurrent[g] + u[k] * left[k * GATES + g].to(tl.float32),)
        recurrent = new
    return recurrent


@triton.jit
def _through(d, weights, dtype, GATES: tl.constexpr):
    """R^T d."""
    total = tl.dot(d[0].to(dtype), weights[0], input_precision="ieee")
    for g in tl.static_range(1, GATES):
        total = tl.dot(d[g].to(dtype), weights[g], total, input_precision="ieee")
    return total


@triton.jit
def _recurrent_streamed(
    source, to, inside, weight, head, size, unit,
    GATES: tl.constexpr, BN: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """R h for the units `unit` (1, UNITS), with the rows of h at `source`."""
    sums = ()
    for _ in tl.static_range(GATES):
        sums = sums + (tl.zeros([BN, UNITS], tl.float32),)
    for depth in range(0, size, DEPTH):
        in_ = depth + tl.arange(0, DEPTH)
        h = tl.load(source + to + in_[None, :], inside & (in_ < size)[None, :], other=0.0)
        tiles = _load(
            weight, head * GATES * size * size + unit * size, in_[:, None], size * size,
            (in_ < size)[:, None] & (unit < size), GATES,
        )  # fmt: skip
        new = ()
        for g in tl.static_range(GATES):
            new = new + (tl.dot(h, tiles[g], sums[g], input_precision="ieee"),)
        sums = new
    return sums


@triton.jit
def _projected_streamed(
    source, to, inside, right, own, size,
    K: tl.constexpr, BN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """u_k = h . right_k, with the rows of h at `source`."""
    u = (tl.zeros([BN, 1], tl.float32),) * K
    for depth in range(0, size, DEPTH):
        in_ = depth + tl.arange(0, DEPTH)[None, :]
        h = tl.load(source + to + in_, inside & (in_ < size), other=0.0)
        u = _add(u, _projected(h, _load(right, own * K * size, in_, size, in_ < size, K), K), K)
    return u


@triton.jit
def _through_streamed(
    grad_x, own, row, inside, weight, head, heads, size, unit,
    GATES: tl.constexpr, OWN: tl.constexpr, BN: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """R^T d for the units `unit` (1, UNITS), with d as it was stored in `grad_x` and, its last gates, in `own`."""
    total = tl.zeros([BN, UNITS], tl.float32)
    for depth in range(0, size, DEPTH):
        out = depth + tl.arange(0, DEPTH)
        valid = inside & (out < size)[None, :]
        tiles = _load(
            weight, head * GATES * size * size + out.to(tl.int64)[:, None] * size, unit, size * size,
            (out < size)[:, None] & (unit < size), GATES,
        )  # fmt: skip
        d = _load(grad_x, (row * heads + head) * GATES * size, out[None, :], size, valid, GATES - OWN)
        d = d + _load(own, (row * heads + head) * OWN * size, out[None, :], size, valid, OWN)
        for g in tl.static_range(GATES):
            total = tl.dot(d[g], tiles[g], total, input_precision="ieee")
    return total
