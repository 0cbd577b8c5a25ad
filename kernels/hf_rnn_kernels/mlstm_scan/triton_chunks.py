"""What the Triton kernels of the mLSTM share: how time is cut, gates, and the states between chunks.

Time is cut into chunks of L tokens; within one, tokens see each other in tiles of BT x BT, as in attention, and what
was before it through the state at its start. F is the sum of the log forget gates from the chunk's start on,
g_j = i_j - F_j, M_i = max(m at the start, g_j for j <= i), and

    D_ij = exp(g_j - M_i) for j <= i,  e_i = exp(m_start - M_i),  w_j = exp(g_j - M_L),  m_i = F_i + M_i,

none of them above 1. g and M may be thousands where their difference is 1, so both are kept as two floats each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# As in `gated_scan`. i and f may be columns of a projection that begin anywhere.
_jit = triton.jit(
    do_not_specialize=["time", "rows", "sequences", "heads", "chunks", "i_row", "i_head", "f_row", "f_head"],
    do_not_specialize_on_alignment=["mask", "table", "offsets", "firsts", "i", "f"],
)


# Where things are. `row` is that of a chunk's first token, `t` counts from there, so that offsets in a tile are small.
# STEP is 1, or -1 where sequences are read from their ends: token t of a chunk lies in row + t * STEP.


@triton.jit
def _chunk(table, c, time, chunks, L: tl.constexpr, STEP: tl.constexpr):
    """First row and length of chunk c, of `chunks` in each sequence if these are not packed."""
    if table is None:
        t = (c % chunks) * L
        row = (c // chunks).to(tl.int64) * time + t
        if STEP < 0:
            row += time - 1 - 2 * t
        length = tl.minimum(time - t, L).to(tl.int32)
    else:
        row = tl.load(table + 2 * c)
        length = tl.load(table + 2 * c + 1).to(tl.int32)
    return row, length


@triton.jit
def _sequence(offsets, firsts, n, time, chunks, STEP: tl.constexpr):
    """First row and length of sequence n, and its first chunk."""
    if offsets is None:
        row, length, first = n * time, time, n * chunks
    else:
        row, first = tl.load(offsets + n), tl.load(firsts + n)
        length = tl.load(offsets + n + 1) - row
    if STEP < 0:
        row += length - 1
    return row, length, first


@triton.jit
def _place(row, rows, STEP: tl.constexpr):
    """Of the token in this row in what the kernels keep for each other: there tokens lie as they are read."""
    if STEP < 0:
        row = rows - 1 - row
    return row


@triton.jit
def _live(mask, row, t, length, STEP: tl.constexpr):
    """Whether a token is inside its chunk and not padding."""
    inside = t < length
    if mask is not None:
        inside = inside & (tl.load(mask + row + t * STEP, inside, other=0) != 0)
    return inside


@triton.jit
def _tile(base, t, live, column, stride, WIDTH: tl.constexpr):
    """Rows t, columns `column` of what begins at `base`; zeros where there is nothing."""
    inside = live[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + t[:, None] * stride + column[None, :], inside, other=0.0)


@triton.jit
def _tiles(base, t, live, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """All columns, BLOCK after BLOCK."""
    tiles = ()
    for begin in tl.static_range(0, WIDTH, BLOCK):
        tiles = tiles + (_tile(base, t, live, begin + tl.arange(0, BLOCK), stride, WIDTH),)
    return tiles


@triton.jit
def _state_tile(base, key, value, K: tl.constexpr, V: tl.constexpr):
    """Rows `key`, columns `value` of a matrix (K, V)."""
    return tl.load(base + key[:, None] * V + value[None, :], (key < K)[:, None] & (value < V)[None, :], other=0.0)


@triton.jit
def _store_state(base, key, value, tile, K: tl.constexpr, V: tl.constexpr):
    tl.store(base + key[:, None] * V + value[None, :], tile, (key < K)[:, None] & (value < V)[None, :])


@triton.jit
def _dot(a, b, sums, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DTYPE), b.to(DTYPE), sums, input_precision=PRECISION)


# Gates: six planes (heads, rows) of float32: g and what its rounding lost; the same of its running maximum P, which is
# M without the state; F; and F + P, which is m without the state.


@triton.jit
def _log_sigmoid(x):
    """log(1 + e) as 2 artanh(e / (2 + e)), a series that keeps all bits of a small e."""
    e = tl.exp(-tl.abs(x))
    # Of log(1 + e), 1 + e would round away a small e.
    z = e / (2.0 + e)
    y = z * z
    series = 1 / 9 + y * (1 / 11 + y * (1 / 13 + y * (1 / 15)))
    series = 1.0 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * series)))
    return tl.minimum(x, 0.0) - 2.0 * z * series


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _two_floats(x):
    # inf - inf would be NaN.
    high = x.to(tl.float32)
    return high, tl.where(high > float("-inf"), (x - high).to(tl.float32), 0.0)


@_jit
def _gates(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks, i, f, i_row, i_head, f_row, f_head,
    gates, L: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Writes the planes; sums in float64, because errors of F are errors of D."""
    c, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    row, length = _chunk(table, c, time, chunks, L, STEP)
    t = tl.arange(0, L)
    live = _live(mask, row, t, length, STEP)
    i_t = tl.load(i + row * i_row + head * i_head + t * (i_row * STEP), live, other=float("-inf")).to(tl.float32)
    f_t = tl.load(f + row * f_row + head * f_head + t * (f_row * STEP), live, other=0.0).to(tl.float32)
    log_f = tl.maximum(_log_sigmoid(f_t), -1e4)  # e^-10000 is zero; a sum with -inf would lose what comes after
    # Padding adds zero: it forgets nothing. Its i of -inf weighs nothing.
    F = tl.cumsum(tl.where(live, log_f, 0.0).to(tl.float64), 0)
    g = i_t - F
    P = tl.associative_scan(g, 0, _larger)
    to, plane = gates + head * rows + _place(row, rows, STEP) + t, heads * rows
    high, low = _two_floats(g)
    tl.store(to, high, t < length)
    tl.store(to + plane, low, t < length)
    high, low = _two_floats(P)
    tl.store(to + 2 * plane, high, t < length)
    tl.store(to + 3 * plane, low, t < length)
    tl.store(to + 4 * plane, F.to(tl.float32), t < length)
    tl.store(to + 5 * plane, (F + P).to(tl.float32), t < length)


@triton.jit
def _pair(planes, t, length, plane):
    """Two planes at the tokens t of the chunk that begins at `planes`: a number and what its rounding lost."""
    high = tl.load(planes + t, t < length, other=float("-inf"))
    return high, tl.load(planes + plane + t, t < length, other=0.0)


@triton.jit
def _last_pair(planes, length, plane, L: tl.constexpr):
    """Two planes at the chunk's last token; zeros if there is no such chunk."""
    at = planes + tl.minimum(length, L) - 1
    return tl.load(at, length > 0, other=0.0), tl.load(at + plane, length > 0, other=0.0)


@triton.jit
def _kept(m_start, high, low):
    """Whether m at the chunk's start is larger than P."""
    return (m_start > high) | ((m_start == high) & (low < 0.0))


@triton.jit
def _larger_of(m_start, high, low):
    kept = _kept(m_start, high, low)
    return tl.where(kept, m_start, high), tl.where(kept, 0.0, low)


@triton.jit
def _maxima(gates, t, length, plane, m_start):
    """M of the tokens t."""
    high, low = _pair(gates + 2 * plane, t, length, plane)
    return _larger_of(m_start, high, low)


@triton.jit
def _last_maximum(gates, length, plane, m_start, L: tl.constexpr):
    high, low = _last_pair(gates + 2 * plane, length, plane, L)
    return _larger_of(m_start, high, low)


@triton.jit
def _factor(a, a_low, b, b_low):
    """exp(a - b): the first difference is exact, or so large that the result is none."""
    # Two differences first: added one after another, the small parts would be lost in the large.
    return tl.exp((a - b) + (a_low - b_low))


# States between chunks.


@_jit
def _states(
    mask, table, offsets, firsts, time: tl.int64, rows: tl.int64, heads, chunks, gates,
    k, v, k_row, k_head, v_row, v_head, first_C, first_n, first_m, C, n, m, last_C, last_n, last_m,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Walks the chunks of one head of one sequence with one block of C in registers, and writes C, n and m at each
    chunk's start, C rounded to what the products take, and at the end."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    parts: tl.constexpr = blocks * ((K + BK - 1) // BK)
    block, key_block = tl.program_id(0) % blocks, (tl.program_id(0) // blocks) % (parts // blocks)
    head = ((tl.program_id(0) // parts) % heads).to(tl.int64)
    sequence = (tl.program_id(0) // parts // heads).to(tl.int64)
    key, value = key_block * BK + tl.arange(0, BK), block * BV + tl.arange(0, BV)
    row, length, c = _sequence(offsets, firsts, sequence, time, chunks, STEP)
    gates, plane = gates + head * rows + _place(row, rows, STEP), heads * rows
    k, v = k + row * k_row + head * k_head, v + row * v_row + head * v_head
    k_row, v_row = k_row * STEP, v_row * STEP
    to = sequence * heads + head
    if first_C is None:
        state, keys, m_t = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32), tl.full([], 0.0, tl.float32)
    else:
        state = _state_tile(first_C + to * (K * V), key, value, K, V)
        keys, m_t = tl.load(first_n + to * K + key, key < K, other=0.0), tl.load(first_m + to)
    high, low = _last_pair(gates + 2 * plane, length, plane, L)
    F, local = _last_pair(gates + 4 * plane, length, plane, L)
    for begin in tl.range(0, length, L, num_stages=STAGES):
        at = (c + begin // L) * heads + head
        _store_state(C + at * (K * V), key, value, state.to(C.dtype.element_ty), K, V)
        if block == 0:
            tl.store(n + at * K + key, keys, key < K)
            if key_block == 0:
                tl.store(m + at, m_t)
        M, M_low = _larger_of(m_t, high, low)
        # m is a float alone: it is a state that callers see.
        decay = _factor(m_t, 0.0, M, M_low)
        m_t = tl.maximum(F + m_t, local)
        state, keys = state * decay, keys * decay
        for part in tl.static_range(0, L, BT):
            u = part + tl.arange(0, BT)
            live = _live(mask, row + begin * STEP, u, length - begin, STEP)
            g, g_low = _pair(gates + begin, u, length - begin, plane)
            w = _factor(g, g_low, M, M_low)[:, None]
            k_t = _tile(k + begin * k_row, u, live, key, k_row, K)  # from memory to the product, on no detour
            v_t = _tile(v + begin * v_row, u, live, value, v_row, V) * w
            state = _dot(tl.trans(k_t), v_t, state, DTYPE, PRECISION)
            keys += tl.sum(k_t * w, 0)
        # The next chunk's gates: on m waits everything, so they are on their way already.
        left = length - begin - L
        high, low = _last_pair(gates + begin + L + 2 * plane, left, plane, L)
        F, local = _last_pair(gates + begin + L + 4 * plane, left, plane, L)
    _store_state(last_C + to * (K * V), key, value, state, K, V)
    if block == 0:
        tl.store(last_n + to * K + key, keys, key < K)
        if key_block == 0:
            tl.store(last_m + to, m_t)


# Host code.


def _is_amd(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is not None


def _plan(dtype: torch.dtype, keys: int, values: int, amd: bool) -> dict:
    """Tiles, warps, and the dtype of products with what is computed here; from what Triton 3.7 makes of the kernels."""
    # Products of 32 bits: their tiles are twice as large, so half as long.
    wide = dtype != torch.bfloat16
    most = 64 if wide else 128
    block = {name: min(most, max(16, triton.next_power_of_2(n))) for name, n in (("BK", keys), ("BV", values))}
    fused = dtype == torch.float32 and not amd  # no matrix units there: tiles take more registers
    warps = 8 if (keys | values) % 8 and not wide and not amd else 4  # loads of less than 16 bytes need more addresses
    return block | {
        "L": 64 if wide else 128,
        "BT": 32 if wide else 64,
        # A state or a gradient divided by e^-m may be beyond float16.
        "DTYPE": tl.float32 if wide else tl.bfloat16,
        "PRECISION": "tf32" if dtype == torch.float16 else "ieee",
        # Of a walk: many programs, each with a short way from one chunk to the next.
        "walk": {
            "BK": min(32 if wide else 64, block["BK"]),
            "BV": min(32 if fused else 64, block["BV"]),
            "STAGES": 1 if fused else 2,
            "num_warps": warps,
        },
        "of_values": {"num_warps": 8 if fused or (keys > 128 and not amd) else 4, "num_stages": 2},
        "of_keys": {"num_warps": 8 if fused or block["BK"] > 64 else 4, "num_stages": 2},
    }


def _heads_and_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """A (B, T, H, ...) tensor and the distances of its rows and heads; copies what has no constant ones."""
    batch, time = x.shape[:2]
    row = x.stride(1) if time > 1 else x.stride(0)
    whole = x.dim() == 3 or x.stride(3) == 1 or x.shape[3] == 1
    if not whole or (batch > 1 and x.stride(0) != time * row):
        x = x.contiguous()
        row = x.stride(1)
    return x, row, x.stride(2)


def _cut(cu_seqlens: Tensor, rows: int, L: int, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(first row, length) of each chunk, empty ones last; the sequences' bounds and first chunks. No value is read on
    the host, so there are as many chunks as there could be. Wrong offsets never lead to a wrong address."""
    offsets = cu_seqlens.long().clamp(0, rows).cummax(0).values
    starts, stops = offsets[:-1], offsets[1:]
    counts = (stops - starts + L - 1) // L
    ends = counts.cumsum(0)
    c = torch.arange(rows // L + len(counts), device=offsets.device)
    n = torch.searchsorted(ends, c, right=True).clamp(max=len(counts) - 1)
    # Which sequence a chunk is of, and which of its chunks.
    done = (c - (ends - counts)[n]) * L
    length = (stops[n] - starts[n] - done).clamp(0, L)
    first = stops[n] - 1 - done if reverse else starts[n] + done
    return torch.stack([first.clamp(0, rows), length], 1), offsets, ends - counts


class _Launch:
    """The arguments that the kernels of one scan share, and the launches both directions need."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, states: list[Tensor], mask: Tensor | None,
        cu_seqlens: Tensor | None, reverse: bool,
    ):  # fmt: skip
        batch, time, self.heads, self.keys = q.shape
        self.rows, self.values, self.device, self.step = batch * time, v.shape[3], q.device, -1 if reverse else 1
        self.plan = _plan(q.dtype, self.keys, self.values, _is_amd(q.device))
        self.dtype = torch.bfloat16 if self.plan["DTYPE"] == tl.bfloat16 else torch.float32  # of products' operands
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        chunks, table, offsets, firsts = triton.cdiv(time, self.plan["L"]), None, None, None
        self.chunks = batch * chunks
        if cu_seqlens is not None:
            table, offsets, firsts = _cut(cu_seqlens, self.rows, self.plan["L"], reverse)
            self.chunks = table.shape[0]
        # Of 16 bits because Triton lays out the operands of `tl.dot` for the narrowest load they depend on.
        mask = None if mask is None else mask.bool().to(torch.int16).contiguous()
        self.q, self.k, self.v = (_heads_and_rows(x) for x in (q, k, v))
        self.shared = (mask, table, offsets, firsts, time, self.rows, self.heads, chunks)
        self.first = [s.float().contiguous() for s in states] or [None, None, None]
        (i, *i_apart), (f, *f_apart) = _heads_and_rows(i), _heads_and_rows(f)
        self.gates = self.empty(6, self.heads, self.rows)
        self.run(_gates, self.chunks, i, f, *i_apart, *f_apart, self.gates, L=self.plan["L"], num_warps=1)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(self, kernel, programs: int, *arguments, **constants) -> None:
        kernel[(programs * self.heads,)](*self.shared, *arguments, STEP=self.step, **constants)

    def tiles(self, *names: str) -> dict:
        return {"K": self.keys, "V": self.values} | {name: self.plan[name] for name in names}

    def blocks(self, name: str) -> int:
        """How many blocks of `BK` keys, of `BV` values, or of `BT` tokens in a chunk."""
        return triton.cdiv({"BK": self.keys, "BV": self.values, "BT": self.plan["L"]}[name], self.plan[name])

    def state_shapes(self, count: int) -> list[tuple[int, ...]]:
        return [(count, self.heads, *rest) for rest in ((self.keys, self.values), (self.keys,), ())]

    def between(self) -> list[Tensor]:
        """Empty C and n for each chunk. C is rounded as the products would round it."""
        C, n, _ = self.state_shapes(self.chunks)
        return [self.empty(*C, dtype=self.dtype), self.empty(*n)]

    def walk(self, kernel, *arguments) -> None:
        """One program for each sequence, head and block of a state."""
        constants = self.tiles("L", "BT", "DTYPE", "PRECISION") | self.plan["walk"]
        parts = triton.cdiv(self.keys, constants["BK"]) * triton.cdiv(self.values, constants["BV"])
        self.run(kernel, self.sequences * parts, *arguments, **constants)

    def states(self) -> tuple[list[Tensor], list[Tensor]]:
        """C, n and m at each chunk's start and after the last."""
        every = [*self.between(), self.empty(self.chunks, self.heads)]
        last = [self.empty(*shape) for shape in self.state_shapes(self.sequences)]
        (k, *k_apart), (v, *v_apart) = self.k, self.v
        self.walk(_states, self.gates, k, v, *k_apart, *v_apart, *self.first, *every, *last)
        return every, last
