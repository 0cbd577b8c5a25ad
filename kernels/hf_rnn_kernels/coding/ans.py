"""An asymmetric numeral system over the frequencies of a tensor's own symbols.

Streams are those of constriction's `AnsCoder` (32-bit words, 64-bit state, frequencies in 2^-24), which encodes them.
"""

import importlib
import struct

import numpy as np

from hf_rnn_kernels.coding import exp_golomb

# constriction's, for words of 32 bits.
PRECISION = 24
MAX_SYMBOLS = 2**16  # distinct; a table of more costs more than it saves


class Table:
    """The distinct symbols of a tensor and how often each occurs.

    Args:
        values: int64, rising.
        counts: int64, at least 1 each; where they sum to over 2^24, their shares of that are kept.
    """

    def __init__(self, values: np.ndarray, counts: np.ndarray):
        total = int(counts.sum())
        if total > 2**PRECISION:  # in floats: their product with 2^24 is beyond an integer for the largest tensors
            counts = np.maximum((counts / total * 2**PRECISION).astype(np.int64), 1)
        self.values, self.counts = values, counts

    @property
    def frequencies(self) -> np.ndarray:
        """int64 shares of 2^24, at least 1 each; the commonest symbol takes what rounding leaves."""
        # Each symbol has one unit for sure, and its share of what is left.
        shares = self.counts * (2**PRECISION - len(self.counts)) // self.counts.sum() + 1
        shares[np.argmax(shares)] += 2**PRECISION - shares.sum()
        return shares

    def to_bytes(self) -> bytes:
        """Exp-Golomb codes of the gaps between values, then of the counts."""
        # Gaps and counts are small numbers, mostly; the values themselves are not.
        gaps = np.concatenate([exp_golomb.zigzag(self.values[:1]), np.diff(self.values) - 1])
        orders = [exp_golomb.best_order(u, np.ones_like(u))[0] for u in (gaps, self.counts - 1)]
        parts = [exp_golomb.encode(u, k) for u, k in zip((gaps, self.counts - 1), orders, strict=True)]
        return struct.pack("<IIBB", len(gaps), len(parts[0]), *orders) + b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Table":
        head = struct.calcsize("<IIBB")
        count, cut, k_gaps, k_counts = struct.unpack("<IIBB", data[:head])
        # Before anything is allocated: a damaged count would ask for gigabytes.
        if not 1 <= count <= min(MAX_SYMBOLS, 8 * len(data)) or max(k_gaps, k_counts) > exp_golomb.MAX_ORDER:
            raise ValueError(f"{count} symbols of orders {k_gaps} and {k_counts}")
        gaps = exp_golomb.decode([data[head : head + cut]], [count], k_gaps)
        counts = exp_golomb.decode([data[head + cut :]], [count], k_counts) + 1
        values = np.concatenate([exp_golomb.unzigzag(gaps[:1]), gaps[1:] + 1]).cumsum()
        return cls(values, counts)

    def model(self):
        """constriction's. Shares that are whole multiples of 2^-24 stay what they are (`perfect`)."""
        shares = self.frequencies / 2**PRECISION
        return _constriction().stream.model.Categorical(shares, perfect=True, lazy=False)


def _constriction():
    return importlib.import_module("constriction")


def encode(indices: list[np.ndarray], table: Table) -> list[bytes]:
    """Each chunk of int32 places in the table. One symbol alone needs no bits."""
    if len(table.values) == 1:
        return [b""] * len(indices)
    # One table for a tensor: one for each class of rows or columns saved 0.03 bits a weight at most.
    model, chunks = table.model(), []
    for chunk in indices:
        coder = _constriction().stream.stack.AnsCoder()
        # Last in, first out: written backwards, so that reading goes forward.
        coder.encode_reverse(chunk, model)
        chunks.append(coder.get_compressed().astype("<u4").tobytes())
    return chunks


def decode(chunks: list[bytes], counts: list[int], table: Table) -> np.ndarray:
    """The symbols of all chunks, int64."""
    if len(table.values) == 1:
        return np.full(sum(counts), table.values[0])
    # Holds the interpreter's lock, so that threads gain nothing: `cpu.py` has a compiled loop.
    model, parts = table.model(), []
    for chunk, count in zip(chunks, counts, strict=True):
        coder = _constriction().stream.stack.AnsCoder(np.frombuffer(chunk, "<u4").astype(np.uint32))
        parts.append(table.values[coder.decode(model, count)])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
