"""The trellis of `trellis.py`, and the frequencies of its symbols."""

import struct

import numpy as np

from hf_rnn_kernels.coding import exp_golomb
from hf_rnn_kernels.coding.ans import MAX_SYMBOLS, PRECISION, Table

STATES = 32
SEGMENT = 4096  # weights, after which the state is 0 again: what the search takes side by side
_CHECKS = 0o10, 0o45  # Ungerboeck's parity-check polynomials of 32 states
SAMPLE = 32  # segments by which the bits of symbols are estimated
WIDEST = 2**22 - 1  # of n; a table of more bits is beyond all use
# An eighth of an octave: 2^(16 + i / 8), in integers, since powers differ in their last digit from machine to machine
_EIGHTHS = np.array([65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194], np.int64)


def _outputs() -> np.ndarray:
    """(STATES, 2) int64: n mod 4 of the set that leads from a state s to (2 s + b) mod STATES, for b = 0 and 1."""
    found = np.zeros((STATES, 2), np.int64)
    for s in range(STATES):
        for b in range(2):
            low, high = ((2 * s + b) & check for check in _CHECKS)
            found[s, b] = 2 * (high.bit_count() & 1) + (low.bit_count() & 1)
    return found


OUTPUTS = _outputs()
ODD = OUTPUTS[:, 0] & 1  # whether n is odd, by state
INPUT = np.argsort(OUTPUTS >> 1, axis=1)  # [s, n >> 1 & 1]: the b that leads on


class Tables:
    """The frequencies of even and of odd n, kept to an eighth of an octave: that costs 0.001 bits a weight, and exact
    ones of two tables would cost small tensors more.

    Args:
        even, odd: values, int64, rising, and 8 log2 of how often they occur, int64; None where there are none.
    """

    def __init__(self, *parts: tuple[np.ndarray, np.ndarray] | None):
        self._parts = parts
        self.pair = [None if part is None else Table(part[0], _counts(part[1])) for part in parts]

    @classmethod
    def of(cls, table: Table) -> "Tables | None":
        """From how often each n occurs; None where there are too many distinct ones."""
        parts: list[tuple[np.ndarray, np.ndarray] | None] = []
        for u in (0, 1):
            values, counts = (x[table.values % 2 == u] for x in (table.values, table.counts))
            if len(values) > MAX_SYMBOLS:
                return None
            eighths = np.rint(8 * np.log2(counts)).astype(np.int64)
            while len(values) and _counts(eighths).sum() > 2**PRECISION:  # what a table would change
                eighths = np.maximum(eighths - 8, 0)
            parts.append((values, eighths) if len(values) else None)
        return cls(*parts)

    def bits(self, table: Table) -> float:
        """Of the codes of n that occur so often, and of the tables."""
        total = 8.0 * len(self.to_bytes())
        for u, own in enumerate(self.pair):
            if own is not None:
                total -= float((table.counts[table.values % 2 == u] * np.log2(own.frequencies / 2.0**PRECISION)).sum())
        return total

    def to_bytes(self) -> bytes:
        parts = []
        for found in self._parts:
            part = b""
            if found is not None:
                halves = found[0] >> 1
                gaps = np.concatenate([exp_golomb.zigzag(halves[:1]), np.diff(halves) - 1])
                # Neighbours are about as frequent.
                changes = exp_golomb.zigzag(np.diff(found[1], prepend=0))
                orders = [exp_golomb.best_order(u, np.ones_like(u))[0] for u in (gaps, changes)]
                codes = [exp_golomb.encode(u, k) for u, k in zip((gaps, changes), orders, strict=True)]
                part = struct.pack("<IIBB", len(gaps), len(codes[0]), *orders) + b"".join(codes)
            parts.append(struct.pack("<I", len(part)) + part)
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Tables":
        parts = []
        for u in (0, 1):
            (size,) = struct.unpack_from("<I", data)
            part, data = data[4 : 4 + size], data[4 + size :]
            if len(part) != size:
                raise ValueError(f"a table of {size} bytes, {len(part)} are there")
            parts.append(cls._part(part, u) if part else None)
        return cls(*parts)

    @staticmethod
    def _part(data: bytes, u: int) -> tuple[np.ndarray, np.ndarray]:
        head = struct.calcsize("<IIBB")
        count, cut, k_gaps, k_counts = struct.unpack("<IIBB", data[:head])
        # Before anything is allocated: a damaged count would ask for gigabytes.
        if not 1 <= count <= min(MAX_SYMBOLS, 8 * len(data)) or max(k_gaps, k_counts) > exp_golomb.MAX_ORDER:
            raise ValueError(f"{count} symbols of orders {k_gaps} and {k_counts}")
        gaps = exp_golomb.decode([data[head : head + cut]], [count], k_gaps)
        eighths = exp_golomb.unzigzag(exp_golomb.decode([data[head + cut :]], [count], k_counts)).cumsum()
        if eighths.min() < 0 or eighths.max() >= 8 * 40:
            raise ValueError("counts beyond all weights")
        values = np.concatenate([exp_golomb.unzigzag(gaps[:1]), gaps[1:] + 1]).cumsum()
        return 2 * values + u, eighths


def _counts(eighths: np.ndarray) -> np.ndarray:
    """Integers next to 2^(eighths / 8), the same on every machine."""
    return np.maximum((_EIGHTHS[eighths % 8] << (eighths // 8)) + 2**15 >> 16, 1)
