"""The trellis compiled: sixteen segments in the lanes of a vector, the symbols' ANS, chunks side by side."""

import numpy as np
from numba import njit, prange

from hf_rnn_kernels.coding.ans import PRECISION
from hf_rnn_kernels.coding.trellis_tables import INPUT, ODD, OUTPUTS, SEGMENT, STATES, Tables
from hf_rnn_kernels.cpu_cache import loop
from hf_rnn_kernels.threads import run

_parallel = loop(parallel=True)
_LANES = 16
_HALF = STATES // 2
_SHORT = 12  # bits looked up at once
_U = np.uint64
_FAR = np.float32(1e30)


@njit(inline="always")
def _nearest(x, w, bits, offset, multiplier, j):
    below = np.int32(np.floor((x - np.float32(j)) * np.float32(0.25)) * np.float32(4)) + np.int32(j)
    d = x - np.float32(below)
    best, n = w * d * d + multiplier * bits[below + offset], below
    d = x - np.float32(below + 4)
    cost = w * d * d + multiplier * bits[below + 4 + offset]
    if cost < best:
        best, n = cost, below + np.int32(4)
    if j == 0:
        cost = w * x * x + multiplier * bits[offset]
        if cost < best:
            best, n = cost, np.int32(0)
    return best, n


@_parallel
def _search(ratio, importance, bits, multiplier, parts, outputs, out):
    offset = bits.size // 2
    for group in prange((parts.size + _LANES - 1) // _LANES):
        count = min(_LANES, parts.size - group * _LANES)
        starts = np.zeros(_LANES, np.int64)
        lengths = np.zeros(_LANES, np.int64)
        for lane in range(count):
            starts[lane] = parts[group * _LANES + lane] * SEGMENT
            lengths[lane] = min(SEGMENT, ratio.size - starts[lane])
        longest = lengths.max()
        cost = np.full((STATES, _LANES), _FAR, np.float32)
        cost[0] = 0
        new = np.empty((STATES, _LANES), np.float32)
        branch = np.zeros((4, _LANES), np.float32)
        lowest = np.empty(_LANES, np.float32)
        later = np.empty((longest, _LANES), np.uint32)  # a bit for each state
        word = np.empty(_LANES, np.uint32)
        for t in range(longest):
            for lane in range(_LANES):
                if t < lengths[lane]:
                    x, w = ratio[starts[lane] + t], importance[starts[lane] + t]
                    for j in range(4):
                        branch[j, lane] = _nearest(x, w, bits, offset, multiplier, j)[0]
                else:
                    for j in range(4):
                        branch[j, lane] = 0
            word[:] = 0
            for p in range(_HALF):
                for b in range(2):
                    first, second = outputs[p, b], outputs[p + _HALF, b]
                    shift = np.uint32(2 * p + b)
                    for lane in range(_LANES):
                        one = cost[p, lane] + branch[first, lane]
                        other = cost[p + _HALF, lane] + branch[second, lane]
                        new[2 * p + b, lane] = min(one, other)
                        word[lane] |= np.uint32(other < one) << shift
            later[t] = word
            cost, new = new, cost
            if t % 32 == 0:
                lowest[:] = cost[0]
                for s in range(1, STATES):
                    for lane in range(_LANES):
                        lowest[lane] = min(lowest[lane], cost[s, lane])
                for s in range(STATES):
                    for lane in range(_LANES):
                        cost[s, lane] -= lowest[lane]
        for lane in range(count):
            state = 0
            for s in range(STATES):
                if cost[s, lane] < cost[state, lane]:
                    state = s
            for t in range(longest - 1, -1, -1):
                previous = (state >> 1) + _HALF * ((later[t, lane] >> np.uint32(state)) & np.uint32(1))
                if t < lengths[lane]:
                    i = starts[lane] + t
                    j = outputs[previous, state & 1]
                    out[i] = _nearest(ratio[i], importance[i], bits, offset, multiplier, j)[1]
                state = previous


def search(ratio, importance, bits, multiplier, parts, out) -> None:
    run(_search, ratio, importance, bits, multiplier, parts, OUTPUTS, out)


@_parallel
def _follow(n, odd, inputs, out):
    for c in prange((n.size + SEGMENT - 1) // SEGMENT):
        s = 0
        for i in range(c * SEGMENT, min((c + 1) * SEGMENT, n.size)):
            out[i] = odd[s] if n[i] & 1 == odd[s] else 2
            s = (2 * s + inputs[s, (n[i] >> 1) & 1]) % STATES


def follow(n: np.ndarray) -> np.ndarray:
    out = np.empty(n.size, np.uint8)
    run(_follow, n, ODD, INPUT, out)
    return out


@_parallel
def _write(places, odd, chunk, left, frequency, words, sizes):
    for c in prange(sizes.size):
        state, at = _U(0), c * (chunk + 2)
        for i in range(min((c + 1) * chunk, places.size) - 1, c * chunk - 1, -1):
            share = frequency[odd[i], places[i]]
            if state >> _U(64 - PRECISION) >= share:
                words[at] = np.uint32(state & _U(0xFFFFFFFF))
                at += 1
                state >>= _U(32)
            state = ((state // share) << _U(PRECISION)) + left[odd[i], places[i]] + state % share
        while state > _U(0):
            words[at] = np.uint32(state & _U(0xFFFFFFFF))
            at += 1
            state >>= _U(32)
        sizes[c] = at - c * (chunk + 2)


def encode(chunks: list[np.ndarray], odd: list[np.ndarray], tables: Tables) -> list[bytes]:
    if not chunks:
        return []
    n, u, chunk = np.concatenate(chunks), np.concatenate(odd), max(map(len, chunks))
    left, frequency, _ = _shares(tables)
    low, high = int(n.min()), int(n.max())
    if high - low >= max(2**16, n.size):  # few symbols, far apart
        places = np.zeros(n.size, np.int32)
        for parity, table in enumerate(tables.pair):
            if table is not None:
                places[u == parity] = np.searchsorted(table.values, n[u == parity])
    else:
        known = np.zeros(high - low + 1, np.int32)
        for table in tables.pair:
            if table is not None:
                known[table.values - low] = np.arange(len(table.values), dtype=np.int32)
        places = known[n - low]
    words, sizes = np.empty(len(chunks) * (chunk + 2), np.uint32), np.zeros(len(chunks), np.int64)
    run(_write, places, u, chunk, left[:, :-1].astype(np.uint64), frequency, words, sizes)
    starts = np.arange(len(chunks)) * (chunk + 2)
    return [words[a : a + size].astype("<u4").tobytes() for a, size in zip(starts, sizes, strict=True)]


def _shares(tables: Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each parity and symbol, left border (2, N + 1), frequency (2, N) and n (2, N)."""
    most = max(len(table.values) for table in tables.pair if table is not None)
    left = np.full((2, most + 1), 2**PRECISION, np.int64)
    frequency, values = np.ones((2, most), np.uint64), np.zeros((2, most), np.int64)
    left[:, 0] = 0
    for u, table in enumerate(tables.pair):
        if table is not None:
            count = len(table.values)
            left[u, 1 : count + 1] = table.frequencies.cumsum()
            frequency[u, :count], values[u, :count] = table.frequencies, table.values
    return left, frequency, values


@_parallel
def _read(words, offsets, first, cumulative, values, odd, inputs, chunk, step, out):
    mask, shift = _U((1 << PRECISION) - 1), _U(PRECISION)
    for c in prange(offsets.size - 1):
        at, start = offsets[c + 1], offsets[c]
        state, s = _U(0), 0
        for _ in range(2):
            if at > start:
                at -= 1
                state = (state << _U(32)) | _U(words[at])
        for i in range(c * chunk, min((c + 1) * chunk, out.size)):
            if (i - c * chunk) % SEGMENT == 0:
                s = 0
            u = odd[s]
            quantile = state & mask
            k = first[u, quantile >> _U(PRECISION - _SHORT)]
            while _U(cumulative[u, k + 1]) <= quantile:
                k += 1
            left = _U(cumulative[u, k])
            state = (state >> shift) * (_U(cumulative[u, k + 1]) - left) + (quantile - left)
            if state >> _U(32) == _U(0) and at > start:
                at -= 1
                state = (state << _U(32)) | _U(words[at])
            n = values[u, k]
            out[i] = np.float32(n) * step
            s = (2 * s + inputs[s, (n >> 1) & 1]) % STATES


def decode(data: np.ndarray, sizes: np.ndarray, tables: Tables, chunk: int, step: float, out: np.ndarray) -> None:
    """Weights, n times `step`, into `out`, from the chunks that follow each other in `data`."""
    left, _, values = _shares(tables)
    buckets = np.arange(1 << _SHORT) << (PRECISION - _SHORT)
    first = np.stack([np.searchsorted(row, buckets, side="right") - 1 for row in left]).astype(np.int32)
    first = np.minimum(first, values.shape[1] - 1)
    offsets = np.concatenate([[0], np.cumsum(sizes // 4)]).astype(np.int64)
    run(
        _read,
        data.view("<u4"),
        offsets,
        first,
        left.astype(np.uint32),
        values,
        ODD,
        INPUT,
        chunk,
        np.float32(step),
        out,
    )
