"""Rows of a matrix with steps of their own: those of one step are a payload, and the payloads a payload.

In one of these `order` is the number of different steps, `exponent` the finest; its table says which row has which, in
Exp-Golomb codes of the difference to the finest, behind their order (a byte); each chunk is the payload of the rows of
one step, finest first.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hf_rnn_kernels.coding import exp_golomb
from hf_rnn_kernels.coding.payload import CorruptPayloadError, Header, decode_chunks, encode_tensor, join, verified
from hf_rnn_kernels.coding.quantization import MAX_SYMBOL, check_range, entropy, quantize
from hf_rnn_kernels.coding.trellis import WIDEST, entropy_trellis, quantize_trellis

_FEW = 2048  # 1% more bits than ans below, 1 to 3% fewer above, of Laplacian weights at 3 to 5 bits
_HIGHEST = 1e4  # rate: nothing but the cheapest symbol is left long before


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def suited(coder: str, x: Tensor) -> str:
    """The coder, or for few weights "ans" for "trellis": two tables cost them more than the trellis saves."""
    return "ans" if coder == "trellis" and x.numel() < _FEW else coder


def check_symbols(x: Tensor, exponent: int, coder: str) -> None:
    """Raise what the coder's quantizer raises of a range."""
    check_range(x, exponent, WIDEST if coder == "trellis" else MAX_SYMBOL)


def symbols(x: Tensor, exponent: int, rate: float, coder: str, curvature: Tensor | None = None) -> Tensor:
    """What the coder takes: of `quantize_trellis` or of `quantize`."""
    return (quantize_trellis if coder == "trellis" else quantize)(x, exponent, rate, curvature)


def symbol_entropy(q: Tensor, coder: str) -> float:
    """Bits a symbol of the coder's ideal code."""
    return entropy_trellis(q) if coder == "trellis" else entropy(q)


def quantize_rows(x: Tensor, exponents: Tensor, multiplier: float, curvature: Tensor, coder: str) -> Tensor:
    """The rows of one step together.

    Args:
        x: (..., D) weights.
        exponents: (rows,) int64 of each row's step.
        multiplier: how much of curvature * error^2 a bit is worth.
        curvature: of x's shape.
        coder: "trellis", or another.

    Returns:
        int32, of x's shape.
    """
    rows, weights = _as_rows(x.detach().cpu()), _as_rows(curvature)
    q = torch.empty(rows.shape, dtype=torch.int32)
    for exponent in exponents.unique().tolist():
        own = exponents == exponent
        c, spacing = weights[own], 2.0 ** (exponent + 1 if coder == "trellis" else exponent)
        rate = multiplier / max(float(c.mean()) * spacing**2, 1e-300)
        q[own] = symbols(rows[own], exponent, min(rate, _HIGHEST), coder, c)
    return q.reshape(x.shape)


def dequantize_rows(q: Tensor, exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * 2^exponent, of each row its own: exact in float32, rounded once to another dtype."""
    steps = torch.ldexp(torch.ones(len(exponents)), exponents).to(q.device)
    return (_as_rows(q).float() * steps[:, None]).to(dtype).reshape(q.shape)


def encode_rows(q: Tensor, exponents: Tensor, dtype: torch.dtype = torch.float32, coder: str = "ans") -> Tensor:
    """Symbols whose rows have steps of their own as a payload; an ordinary one where they have the same.

    Args:
        q: (..., D) int32; of a trellis from `quantize_rows`.
        exponents: (rows,) int64, 24 different ones at most.
        dtype, coder: as of `encode_tensor`.
    """
    steps = exponents.unique().tolist()  # rising
    if len(steps) <= 1:
        return encode_tensor(q, steps[0] if steps else 0, dtype, coder)
    if len(steps) > exp_golomb.MAX_ORDER:
        raise ValueError(f"exponents: expected {exp_golomb.MAX_ORDER} different ones at most, got {len(steps)}")
    above = exponents.numpy() - steps[0]
    order, _ = exp_golomb.best_order(above, np.ones_like(above))
    table = bytes([order]) + exp_golomb.encode(above, order)
    rows = _as_rows(q)
    chunks = [encode_tensor(rows[exponents == e], e, dtype, coder).numpy().tobytes() for e in steps]
    return join(chunks, dtype, q.shape, steps[0], "rows", len(steps), table)


def row_exponents(header: Header, name: str = "payload") -> Tensor:
    """(rows,) int64 of a header; CorruptPayloadError where its table cannot be read."""
    rows = header.numel // header.shape[-1] if header.shape and header.shape[-1] else 0
    if header.coder != "rows":
        return torch.full((max(rows, 1),), header.exponent)
    damaged = CorruptPayloadError(f"{name}: the steps of its rows are damaged; get the file again")
    if not header.table or header.table[0] > exp_golomb.MAX_ORDER or rows > 8 * len(header.table):
        raise damaged
    above = exp_golomb.decode([header.table[1:]], [rows], header.table[0])
    if len(np.unique(above)) != header.order or above.max(initial=0) > 300:
        raise damaged
    return torch.from_numpy(above) + header.exponent


def decode_rows(header: Header, data: np.ndarray, name: str) -> Tensor:
    """The weights of a payload of payloads, whose checksums were compared."""
    exponents = row_exponents(header, name)
    out = torch.empty((len(exponents), header.shape[-1]), dtype=header.dtype)
    borders = np.concatenate([[0], np.cumsum(header.sizes)]).astype(np.int64)
    for exponent, (a, b) in zip(exponents.unique().tolist(), pairwise(borders), strict=True):
        part, own = torch.from_numpy(data[a:b].copy()), exponents == exponent
        inner, own_data = verified(part, name)
        if inner.coder == "rows" or inner.shape != (int(own.sum()), header.shape[-1]) or inner.dtype != header.dtype:
            raise CorruptPayloadError(f"{name}: the rows of step 2^{exponent} are damaged; get the file again")
        out[own] = decode_chunks(inner, own_data, name)
    return out.reshape(header.shape)


def decode_tensor(payload: Tensor, name: str = "payload") -> Tensor:
    """The weights, bit for bit `dequantize(q, exponent, dtype)`, or the tensor that was stored.

    Args:
        payload: from `encode_tensor` or `store_tensor`.
        name: what errors call it.

    Raises:
        CorruptPayloadError: a checksum differs: which chunk, and of which weights.
    """
    header, data = verified(payload, name)
    return decode_rows(header, data, name) if header.coder == "rows" else decode_chunks(header, data, name)
