"""Both coders compiled: chunks side by side, symbols straight to weights.

Pointers and lengths are checked against the chunk's end at each read, so a damaged chunk gives wrong symbols and no
crash; checksums tell.
"""

from itertools import pairwise

import numpy as np
from numba import njit, prange

from hf_rnn_kernels.coding.ans import PRECISION, Table
from hf_rnn_kernels.cpu_cache import loop
from hf_rnn_kernels.threads import run

_compiled = njit(nogil=True)
_parallel = loop(parallel=True)
_SHORT = 12  # bits looked up at once
_U = np.uint64


@_compiled
def _zigzag(q):
    return _U(2 * q - 1) if q > 0 else _U(-2 * q)


@_compiled
def _bits(v, table):
    n = 0
    while v >= _U(4096):
        v >>= _U(12)
        n += 12
    return n + table[v]


@_parallel
def _count(q, low, counts):
    """Histograms of as many parts as `counts` has rows."""
    parts = counts.shape[0]
    for part in prange(parts):
        # A histogram for each part, since two threads must not count in one.
        for i in range(q.size * part // parts, q.size * (part + 1) // parts):
            counts[part, q[i] - low] += 1


@_parallel
def _sizes(q, k, chunk, table, sizes):
    for c in prange(sizes.size):
        total = 0
        for i in range(c * chunk, min((c + 1) * chunk, q.size)):
            total += 2 * _bits(_zigzag(q[i]) + (_U(1) << _U(k)), table) - k - 1
        sizes[c] = (total + 7) // 8


@_parallel
def _write(q, k, chunk, table, offsets, out):
    for c in prange(offsets.size - 1):
        word, n, at = _U(0), 0, offsets[c]
        for i in range(c * chunk, min((c + 1) * chunk, q.size)):
            # k < 25 and at most 51 bits a code: with 7 left over they fit the word.
            v = _zigzag(q[i]) + (_U(1) << _U(k))
            size = 2 * _bits(v, table) - k - 1
            word = (word << _U(size)) | v
            n += size
            while n >= 8:
                n -= 8
                out[at] = (word >> _U(n)) & _U(255)
                at += 1
        if n:
            out[at] = (word << _U(8 - n)) & _U(255)


@_parallel
def _read(data, offsets, k, chunk, short, step, out):
    order = _U(1) << _U(k)
    for c in prange(offsets.size - 1):
        at, end = offsets[c], offsets[c + 1]
        word, n = _U(0), 0  # the next n bits, from the highest one down
        for i in range(c * chunk, min((c + 1) * chunk, out.size)):
            while n <= 56 and at < end:
                word |= _U(data[at]) << _U(56 - n)
                at += 1
                n += 8
            # Most codes are short: their symbol and length from a table, by the next 12 bits.
            entry = short[word >> _U(64 - _SHORT)]
            if entry:
                size = entry & 15
                u = _U(entry >> 4)
            else:
                zeros, w = 0, word
                # No valid code has more zeros; a damaged one must not loop on.
                while zeros < 25 and not w >> _U(63):
                    w <<= _U(1)
                    zeros += 1
                size = 2 * zeros + k + 1
                # A shift by 64 and more is undefined.
                u = (word >> _U(64 - size)) - order if size < 64 else _U(0)
            word <<= _U(size)
            n -= size
            q = np.int64((u + _U(1)) >> _U(1)) if u & _U(1) else -np.int64(u >> _U(1))
            out[i] = np.float32(q) * step


@_parallel
def _read_ans(words, offsets, first, cumulative, levels, chunk, out):
    mask, shift = _U((1 << PRECISION) - 1), _U(PRECISION)
    for c in prange(offsets.size - 1):
        # A stack: the coder's last words are read first.
        at, start = offsets[c + 1], offsets[c]
        state = _U(0)
        for _ in range(2):
            if at > start:
                at -= 1
                state = (state << _U(32)) | _U(words[at])
        for i in range(c * chunk, min((c + 1) * chunk, out.size)):
            quantile = state & mask
            # The symbol whose range holds the quantile: from a table to its neighbourhood, then step by step.
            s = first[quantile >> _U(PRECISION - _SHORT)]
            while _U(cumulative[s + 1]) <= quantile:
                s += 1
            left = _U(cumulative[s])
            state = (state >> shift) * (_U(cumulative[s + 1]) - left) + (quantile - left)
            # One word at most is missing: states stay at or above 2^32.
            if state >> _U(32) == _U(0) and at > start:
                at -= 1
                state = (state << _U(32)) | _U(words[at])
            out[i] = levels[s]


_BIT_LENGTHS = np.array([int(v).bit_length() for v in range(4096)], np.int64)


def histogram(q: np.ndarray, low: int, high: int) -> np.ndarray:
    """How often each of low..high occurs."""
    counts = np.zeros((8, high - low + 1), np.int64)
    run(_count, q, low, counts)
    return counts.sum(0)


def encode_exp_golomb(q: np.ndarray, k: int, chunk: int) -> list[bytes]:
    sizes = np.zeros(-(-q.size // chunk), np.int64)
    run(_sizes, q, k, chunk, _BIT_LENGTHS, sizes)
    offsets = np.concatenate([[0], sizes.cumsum()])
    out = np.empty(offsets[-1], np.uint8)
    run(_write, q, k, chunk, _BIT_LENGTHS, offsets, out)
    return [out[a:b].tobytes() for a, b in pairwise(offsets)]


def decode_exp_golomb(data: np.ndarray, sizes: np.ndarray, k: int, chunk: int, step: float, out: np.ndarray) -> None:
    """Weights, symbols times `step`, into `out`, from the chunks that follow each other in `data`."""
    prefixes = np.arange(1 << _SHORT)
    top = _BIT_LENGTHS[prefixes]
    size = 2 * (_SHORT - top) + k + 1  # as the leading zeros have it
    whole = (prefixes > 0) & (size <= _SHORT)
    u = (prefixes >> np.maximum(_SHORT - size, 0)) - (1 << k)
    short = np.where(whole, (u << 4) | size, 0).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    run(_read, data, offsets, k, chunk, short, np.float32(step), out)


def decode_ans(data: np.ndarray, sizes: np.ndarray, table: Table, chunk: int, step: float, out: np.ndarray) -> None:
    """The same from an ANS's chunks."""
    cumulative = np.concatenate([[0], table.frequencies.cumsum()]).astype(np.uint32)
    buckets = np.arange(1 << _SHORT) << (PRECISION - _SHORT)
    first = (np.searchsorted(cumulative, buckets, side="right") - 1).astype(np.int32)
    # Exact: the step is a power of two.
    levels = (table.values * step).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes // 4)]).astype(np.int64)
    run(_read_ans, data.view("<u4"), offsets, first, cumulative, levels, chunk, out)
