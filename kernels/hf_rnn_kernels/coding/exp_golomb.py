"""Exp-Golomb codes of order k: v = u + 2^k in 2 * bits(v) - k - 1 bits, the leading zeros saying how long it is.

Signed symbols are mapped to u = 0, 1, 2, 3, 4, ... for q = 0, 1, -1, 2, -2, ... A chunk of symbols is coded by itself
and begins at a byte. This is the code in numpy; `cpu.py` has it compiled.
"""

import numpy as np

MAX_ORDER = 24
_WINDOW = 26  # bits of the largest v: 2^25 - 1 from a symbol, 2^24 from the order
_GROUP = 64  # chunks decoded in lock-step


def zigzag(q: np.ndarray) -> np.ndarray:
    """int64 u of symbols q."""
    q = q.astype(np.int64)
    return np.where(q > 0, 2 * q - 1, -2 * q)


def unzigzag(u: np.ndarray) -> np.ndarray:
    return np.where(u % 2 == 1, (u + 1) // 2, -(u // 2))


def lengths(u: np.ndarray, k: int) -> np.ndarray:
    """Bits of each code."""
    # frexp gives the number of bits exactly where log2 would be rounded; float64 holds every v.
    return 2 * np.frexp((u + (1 << k)).astype(np.float64))[1].astype(np.int64) - k - 1


def best_order(u: np.ndarray, counts: np.ndarray) -> tuple[int, int]:
    """The order with the fewest bits for values u that occur so often, and these bits."""
    sizes = [int((lengths(u, k) * counts).sum()) for k in range(MAX_ORDER + 1)]
    k = int(np.argmin(sizes))
    return k, sizes[k]


def encode(u: np.ndarray, k: int) -> bytes:
    """One chunk."""
    if len(u) and int(u.max()) + (1 << k) >= 1 << _WINDOW:
        raise ValueError(f"u: expected values below 2^{_WINDOW} less 2^{k}, got {u.max()}")
    size = lengths(u, k)
    after = size.cumsum()
    place = np.repeat(after, size) - np.arange(after[-1] if len(u) else 0) - 1  # of a bit in its code, the last is 0
    return np.packbits((np.repeat(u + (1 << k), size) >> place) & 1).tobytes()


def decode(chunks: list[bytes], counts: list[int], k: int) -> np.ndarray:
    """The symbols u of all chunks, one after another; the chunks are read side by side."""
    parts = []
    for start in range(0, len(chunks), _GROUP):
        parts += _decode_group(chunks[start : start + _GROUP], counts[start : start + _GROUP], k)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _decode_group(chunks: list[bytes], counts: list[int], k: int) -> list[np.ndarray]:
    # Room for the window of bits behind the last code.
    width = max(map(len, chunks)) + 16
    data = np.stack([np.frombuffer(chunk.ljust(width, b"\0"), np.uint8) for chunk in chunks])
    bits = np.unpackbits(data, axis=1)
    at = np.where(bits == 1, np.arange(bits.shape[1]), bits.shape[1])
    # For every bit the next one that is set: a code's leading zeros without a search.
    next_one = np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1]
    rows, position = np.arange(len(chunks)), np.zeros(len(chunks), np.int64)
    weights = 1 << np.arange(_WINDOW)[::-1]
    u = np.zeros((len(chunks), max(counts)), np.int64)
    last = bits.shape[1] - _WINDOW
    # One symbol of each chunk at a time, as Python's loop costs the same for one or 64.
    for i in range(max(counts)):
        one = np.minimum(next_one[rows, np.minimum(position, last)], last)
        size = np.minimum(one - position + k + 1, _WINDOW)
        u[:, i] = ((bits[rows[:, None], one[:, None] + np.arange(_WINDOW)] @ weights) >> (_WINDOW - size)) - (1 << k)
        position = one + size
    return [row[:count] for row, count in zip(u, counts, strict=True)]
