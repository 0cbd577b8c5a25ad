"""A quantised tensor as one U8 tensor that says everything about itself.

Layout, little-endian: magic "HRNN", version, dtype, coder, dimensions (bytes each), exponent of the step (i16),
Exp-Golomb order (u16), symbols a chunk (u32), bytes of the frequency table (u32), shape (u64 each), bytes of each chunk
(u32 each), CRC-32 of each chunk (u32 each), the table, CRC-32 of all before (u32); then the chunks.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.coding import ans, exp_golomb, trellis
from hf_rnn_kernels.coding.quantization import MAX_SYMBOL
from hf_rnn_kernels.coding.trellis_tables import Tables

CODERS = ("ans", "exp_golomb", "trellis")
_CODERS = ("ans", "exp_golomb", "raw", "trellis", "rows")  # by their numbers in files
CHUNK = 2**16  # symbols: what is decoded by one thread, and what a checksum covers
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_MAGIC, _VERSIONS, _HEAD = b"HRNN", (1, 2), "<4sBBBBhHII"  # version 2: with the last two coders


class CorruptPayloadError(ValueError):
    """Coded weights are damaged; the message names the tensor, if its name is known, and the place."""


@dataclass(frozen=True)
class Header:
    """What a payload says of its tensor: `order` is Exp-Golomb's, else 0; `table` the frequencies' bytes, if any."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    exponent: int
    coder: str
    order: int
    chunk: int
    sizes: tuple[int, ...]
    checksums: tuple[int, ...]
    table: bytes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def counts(self) -> list[int]:
        """Symbols in each chunk."""
        return [min(self.chunk, self.numel - start) for start in range(0, self.numel, self.chunk)]

    def to_bytes(self) -> bytes:
        head = struct.pack(
            _HEAD, _MAGIC, _VERSIONS[self.coder in ("trellis", "rows")], _DTYPES.index(self.dtype),
            _CODERS.index(self.coder), len(self.shape), self.exponent, self.order, self.chunk, len(self.table),
        )  # fmt: skip
        head += struct.pack(f"<{len(self.shape)}Q{2 * len(self.sizes)}I", *self.shape, *self.sizes, *self.checksums)
        head += self.table
        return head + struct.pack("<I", zlib.crc32(head))


def encode_tensor(q: Tensor, exponent: int, dtype: torch.dtype = torch.float32, coder: str = "ans") -> Tensor:
    """Symbols as a payload.

    Args:
        q: int32, any shape, from `quantize`.
        exponent: of the step.
        dtype: of the weights, q * 2^exponent.
        coder: "ans" over the tensor's own frequencies, or Exp-Golomb where the frequencies would take more than they
            save (a few weights, or nearly all different); "exp_golomb", with the best order, in any case; "trellis", of
            what `quantize_trellis` gave, or Exp-Golomb as for ans.

    Returns:
        uint8, one dimension.
    """
    if coder not in CODERS:
        raise ValueError(f"coder: expected one of {CODERS}, got {coder!r}")
    if dtype not in _FLOATS:
        raise ValueError(f"dtype: expected one of {_FLOATS}, got {dtype}")
    symbols = q.detach().cpu().contiguous().flatten().numpy()
    low, high = (int(symbols.min()), int(symbols.max())) if symbols.size else (0, 0)
    if max(high, -low) > MAX_SYMBOL:
        raise ValueError(f"q: expected symbols within {MAX_SYMBOL} of zero, got {low} to {high}")
    if not -126 <= exponent <= 127:
        raise ValueError(f"exponent: expected a step from 2^-126 to 2^127, got 2^{exponent}")
    table = _frequencies(symbols, low, high)
    order, bits = exp_golomb.best_order(exp_golomb.zigzag(table.values), table.counts)
    # The table counts: for a few weights it is longer than their codes.
    if coder == "trellis":
        odd = trellis.follow(symbols)
        if (odd == 2).any():
            raise ValueError("q: expected a path through the trellis, from quantize_trellis")
        tables = Tables.of(table)
        if symbols.size and tables is not None and tables.bits(table) < bits:
            chunks = trellis.encode(_split(symbols), _split(odd), tables)
            return join(chunks, dtype, q.shape, exponent, coder, 0, tables.to_bytes())
    if coder == "ans" and _ans_bits(table) < bits:
        order, stored = 0, table.to_bytes()
        chunks = ans.encode(_split(_places(symbols, table, low, high)), table)
    else:
        coder, stored, chunks = "exp_golomb", b"", _encode_exp_golomb(symbols, order)
    return join(chunks, dtype, q.shape, exponent, coder, order, stored)


def store_tensor(x: Tensor) -> Tensor:
    """A tensor as it is, as a payload with checksums: what is not worth coding. Any dtype of weights and buffers."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected one of {_DTYPES}, got {x.dtype}")
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    size = CHUNK * x.element_size()
    chunks = [data[start : start + size].tobytes() for start in range(0, data.size, size)]
    return join(chunks, x.dtype, x.shape, 0, "raw", 0, b"")


def join(chunks: list[bytes], dtype, shape, exponent: int, coder: str, order: int, table: bytes) -> Tensor:
    """A payload of chunks, with their checksums; the rest is as in `Header`."""
    sizes, checksums = tuple(map(len, chunks)), tuple(map(zlib.crc32, chunks))
    header = Header(dtype, tuple(shape), exponent, coder, order, CHUNK, sizes, checksums, table)
    return torch.frombuffer(bytearray(header.to_bytes() + b"".join(chunks)), dtype=torch.uint8)


def read_header(payload: Tensor, name: str = "payload") -> tuple[Header, np.ndarray]:
    """What a payload says of itself, and the bytes of its chunks.

    Raises:
        CorruptPayloadError: it is no payload, or its header is damaged or of a later version.
    """
    data = payload.detach().cpu().contiguous().numpy()
    head = struct.calcsize(_HEAD)
    if payload.dtype != torch.uint8 or payload.dim() != 1 or data.size < head or data[:4].tobytes() != _MAGIC:
        raise CorruptPayloadError(f"{name}: expected coded weights, which begin with {_MAGIC!r}")
    _, version, dtype, coder, dims, exponent, order, chunk, table = struct.unpack(_HEAD, data[:head].tobytes())
    if version not in _VERSIONS:
        raise CorruptPayloadError(
            f"{name}: version {version} of the format; this package reads {_VERSIONS[-1]}, upgrade it"
        )
    damaged = CorruptPayloadError(f"{name}: the header is damaged; get the file again")
    if not 0 < chunk <= CHUNK or data.size < head + 8 * dims:  # so that few bytes do not stand for a terabyte
        raise damaged
    shape = struct.unpack(f"<{dims}Q", data[head : head + 8 * dims].tobytes())
    # In Python's integers: a damaged shape may be beyond 64 bits.
    count = order if coder == _CODERS.index("rows") else -(-math.prod(shape) // chunk)
    end = head + 8 * dims + 8 * count + table
    if data.size < end + 4 or zlib.crc32(data[:end].data) != struct.unpack("<I", data[end : end + 4].tobytes())[0]:
        raise damaged
    if dtype >= len(_DTYPES) or coder >= len(_CODERS) or order > exp_golomb.MAX_ORDER or not -126 <= exponent <= 127:
        raise damaged
    if max(shape, default=0) >= 2**63 or (_CODERS[coder] != "raw" and _DTYPES[dtype] not in _FLOATS):
        raise damaged
    sizes = np.frombuffer(data[head + 8 * dims : end - table].tobytes(), "<u4")
    header = Header(
        _DTYPES[dtype], shape, exponent, _CODERS[coder], order, chunk,
        tuple(sizes[:count].tolist()), tuple(sizes[count:].tolist()), data[end - table : end].tobytes(),
    )  # fmt: skip
    if data.size != end + 4 + sum(header.sizes):
        raise CorruptPayloadError(
            f"{name}: expected {end + 4 + sum(header.sizes)} bytes, got {data.size}: the file was cut or joined"
        )
    return header, data[end + 4 :]


def decode_tensor(payload: Tensor, name: str = "payload") -> Tensor:
    """The weights, bit for bit `dequantize(q, exponent, dtype)`, or the tensor that was stored.

    Args:
        payload: from `encode_tensor` or `store_tensor`.
        name: what errors call it.

    Raises:
        CorruptPayloadError: a checksum differs: which chunk, and of which weights.
    """
    header, data = read_header(payload, name)
    offsets = np.concatenate([[0], np.cumsum(header.sizes)]).astype(np.int64)
    # All of them before anything is decoded: damaged codes give wrong weights and no error.
    for i, checksum in enumerate(header.checksums):
        if zlib.crc32(data[offsets[i] : offsets[i + 1]].data) != checksum:
            place = f", weights {i * header.chunk} to {min((i + 1) * header.chunk, header.numel) - 1},"
            raise CorruptPayloadError(
                f"{name}: chunk {i} of {len(header.sizes)}{'' if header.coder == 'rows' else place} is damaged; get "
                "the file again"
            )
    if header.coder == "rows":
        return _decode_rows(header, data, name)
    if header.coder == "raw":
        # A copy, which begins where any dtype may.
        raw = torch.empty(data.size, dtype=torch.uint8)
        raw.numpy()[:] = data
        if raw.numel() != header.numel * header.dtype.itemsize:
            raise CorruptPayloadError(f"{name}: expected {header.numel} elements; get the file again")
        return raw.view(header.dtype).reshape(header.shape)
    try:
        table = ans.Table.from_bytes(header.table) if header.coder == "ans" else None
        tables = Tables.from_bytes(header.table) if header.coder == "trellis" else None
    except (ValueError, IndexError, struct.error) as error:  # only where a checksum was made to fit
        raise CorruptPayloadError(f"{name}: the table of frequencies is damaged ({error})") from error
    if threads.available() and not (table is not None and len(table.values) == 1):
        from hf_rnn_kernels.coding import cpu

        out, step, sizes = np.empty(header.numel, np.float32), 2.0**header.exponent, np.array(header.sizes, np.int64)
        # The copies begin at a multiple of 4 bytes, as words must.
        if tables is not None:
            from hf_rnn_kernels.coding import trellis_cpu

            trellis_cpu.decode(data.copy(), sizes, tables, header.chunk, step, out)
        elif table is not None:
            cpu.decode_ans(data.copy(), sizes, table, header.chunk, step, out)
        else:
            cpu.decode_exp_golomb(data, sizes, header.order, header.chunk, step, out)
        weights = torch.from_numpy(out)
    else:
        chunks = [data[a:b].tobytes() for a, b in pairwise(offsets)]
        if tables is not None:
            q = trellis.decode(chunks, header.counts, tables)
        elif table is not None:
            q = ans.decode(chunks, header.counts, table)
        else:
            q = exp_golomb.unzigzag(exp_golomb.decode(chunks, header.counts, header.order))
        weights = torch.from_numpy(q).float() * 2.0**header.exponent
    return weights.to(header.dtype).reshape(header.shape)


def row_exponents(header: Header, name: str = "payload") -> Tensor:
    """(rows,) int64 of a header; CorruptPayloadError where its table cannot be read."""
    rows = math.prod(header.shape[:-1]) if header.shape else 0
    if header.coder != "rows":
        return torch.full((max(rows, 1),), header.exponent)
    damaged = CorruptPayloadError(f"{name}: the steps of its rows are damaged; get the file again")
    if not header.table or header.table[0] > exp_golomb.MAX_ORDER or rows > 8 * len(header.table):
        raise damaged
    above = exp_golomb.decode([header.table[1:]], [rows], header.table[0])
    if len(np.unique(above)) != header.order or above.max(initial=0) > 300:
        raise damaged
    return torch.from_numpy(above) + header.exponent


def _decode_rows(header: Header, data: np.ndarray, name: str) -> Tensor:
    """The weights of a payload of payloads, whose checksums were compared."""
    exponents = row_exponents(header, name)
    out = torch.empty((len(exponents), header.shape[-1]), dtype=header.dtype)
    borders = np.concatenate([[0], np.cumsum(header.sizes)]).astype(np.int64)
    for exponent, (a, b) in zip(exponents.unique().tolist(), pairwise(borders), strict=True):
        part, own = torch.from_numpy(data[a:b].copy()), exponents == exponent
        inner, _ = read_header(part, name)
        if inner.coder == "rows" or inner.shape != (int(own.sum()), header.shape[-1]) or inner.dtype != header.dtype:
            raise CorruptPayloadError(f"{name}: the rows of step 2^{exponent} are damaged; get the file again")
        out[own] = decode_tensor(part, name)
    return out.reshape(header.shape)


def _frequencies(symbols: np.ndarray, low: int, high: int) -> ans.Table:
    if high - low >= max(2**16, symbols.size):  # few symbols, far apart
        return ans.Table(*(x.astype(np.int64) for x in np.unique(symbols, return_counts=True)))
    if threads.available():
        from hf_rnn_kernels.coding import cpu

        counts = cpu.histogram(symbols, low, high)
    else:
        counts = np.bincount(symbols.astype(np.int64) - low)
    return ans.Table(np.flatnonzero(counts) + low, counts[counts > 0])


def _ans_bits(table: ans.Table) -> float:
    """What the coder would take, near enough, its table included."""
    if not 0 < len(table.counts) <= ans.MAX_SYMBOLS:
        return float("inf")
    return 8 * len(table.to_bytes()) - float((table.counts * np.log2(table.counts / table.counts.sum())).sum())


def _places(symbols: np.ndarray, table: ans.Table, low: int, high: int) -> np.ndarray:
    """int32 place of each symbol in the table."""
    if high - low >= max(2**16, symbols.size):
        return np.searchsorted(table.values, symbols).astype(np.int32)
    place = np.zeros(high - low + 1, np.int32)
    place[table.values - low] = np.arange(len(table.values), dtype=np.int32)
    return place[symbols - low] if symbols.size else symbols


def _split(x: np.ndarray) -> list[np.ndarray]:
    return [x[start : start + CHUNK] for start in range(0, x.size, CHUNK)]


def _encode_exp_golomb(symbols: np.ndarray, order: int) -> list[bytes]:
    if threads.available():
        from hf_rnn_kernels.coding import cpu

        return cpu.encode_exp_golomb(symbols, order, CHUNK)
    return [exp_golomb.encode(exp_golomb.zigzag(part), order) for part in _split(symbols)]
