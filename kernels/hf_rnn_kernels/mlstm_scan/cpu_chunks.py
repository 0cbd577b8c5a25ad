"""Parts of the mLSTM's loops on a CPU, forward and backward: rows of a chunk in and out of matrices, its gates."""

from typing import NamedTuple

import numpy as np
from numba import njit

from hf_rnn_kernels.matrix_product import LANES, product
from hf_rnn_kernels.vector_math import F32, FAST, U, exp, inline, row

_U0, _U1, _LANES = U(0), U(1), U(LANES)
ROWS = U(16)  # of a block of the triangle; what lies above it is skipped. Chunks are multiples of it, and of LANES
_LOWEST = -80.0  # e^-80 times anything that counts is no denormal number yet
_ZERO = F32(0)


class Sizes(NamedTuple):
    """All uint64."""

    chunk_size: np.uint64
    heads: np.uint64
    K: np.uint64
    V: np.uint64
    reverse: np.uint64  # 1 where sequences are read from their ends, else 0


class Chunks(NamedTuple):
    """uint64 arrays: the first chunk of each sequence, as it is read, and their number; the first token of each chunk,
    as it lies; its tokens."""

    first: np.ndarray
    start: np.ndarray
    count: np.ndarray


@inline
def turned(r, turn):
    """How far from a chunk's first token its row r lies: r for a turn of 0, rows - 1 - r for one of rows - 1."""
    # |r - turn|. With first + r * step LLVM asks once for all rows whether arrays overlap, takes a negative step for
    # yes, and vectorises nothing: a row of 64 took `load` 11 nanoseconds, not 5.
    return max(r, turn) - min(r, turn)


@inline
def weight(x):
    """e^x for x <= 0, zero where it is negligible."""
    # Before the choice: a branch around it would stop LLVM.
    y = exp(F32(x))
    return y if x > _LOWEST else _ZERO


# Sums in any order, which vectorise: those of a chunk's normalisers took 1.8 microseconds, now 0.1.
@njit(fastmath=FAST | {"reassoc"}, error_model="numpy")
def dot(size, a, a0, b, b0):
    total = _ZERO
    for d in range(size):
        total += a[a0 + d] * b[b0 + d]
    return total


@njit(fastmath=FAST | {"reassoc"}, error_model="numpy")
def sum_of(size, a, a0):
    result = _ZERO
    for d in range(size):
        result += a[a0 + d]
    return result


@row
def load(rows, size, padded, source, places, mask, tokens, scale, target):
    """Rows of a head, times `scale`, into rows of `padded` floats; zeros after the end and for padding. `places`: where
    the first of all tokens begins, and how far apart they are. `tokens`: the chunk's first, and how rows are turned."""
    (head, apart), (first, turn) = places, tokens
    for r in range(rows):
        token = first + turned(r, turn)
        to, here = r * padded, head + token * apart
        if mask.size > 0 and not mask[token]:
            for d in range(padded):
                target[to + d] = _ZERO
        else:
            for d in range(size):
                target[to + d] = source[here + d] * scale
            for d in range(size, padded):
                target[to + d] = _ZERO


@row
def scale_rows(rows, size, weights, source, target):
    for r in range(rows):
        for d in range(size):
            target[r * size + d] = source[r * size + d] * weights[r]


@row
def transpose(rows, columns, padded, source, s0, target):
    """(rows, columns) with rows of `padded` floats to panels (columns, LANES) of its transpose, zeros behind `rows`."""
    # Into panels, once a chunk: 0.6 microseconds for K, 1.2 for V, of 20 forward.
    for p in range(_U0, rows, _LANES):
        for c in range(columns):
            to = (p * columns) + c * _LANES
            for r in range(min(_LANES, rows - p)):
                target[to + r] = source[s0 + (p + r) * padded + c]
            for r in range(rows - p, _LANES):
                target[to + r] = _ZERO


@row
def gates(rows, i_and_log_f, at, heads, turn, m, g, top, total):
    """g, M and F of a chunk that starts with the stabiliser m."""
    i, log_f = i_and_log_f
    # float64: g_j - M_i is a small difference of sums that may be thousands.
    summed, largest = np.float64(0), np.float64(m)
    for r in range(rows):
        here = at + turned(r, turn) * heads
        summed += log_f[here]
        g[r] = i[here] - summed
        largest = max(largest, g[r])
        top[r], total[r] = largest, summed


@row
def triangle(rows, keys, side, q, k_panels, nothing, w):
    """Q K^T in blocks of rows, each up to its diagonal block; rows of `side` floats. `nothing`: a row of zeros."""
    # Half of the square is beyond the diagonal; in blocks of rows most of it is never computed.
    for b in range(_U0, rows, ROWS):
        product(
            q, (b * keys, keys, _U1),
            k_panels, (_U0, keys * _LANES, _LANES),
            nothing, (_U0, _U0),
            w, (b * side, side),
            min(ROWS, rows - b), keys, (b + ROWS) // _LANES,
        )  # fmt: skip
