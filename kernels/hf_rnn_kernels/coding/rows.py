"""Rows of a matrix with steps of their own: those of one step are a payload, and the payloads a payload.

In one of these `order` is the number of different steps, `exponent` the finest; its table says which row has which, in
Exp-Golomb codes of the difference to the finest, behind their order (a byte); each chunk is the payload of the rows of
one step, finest first.
"""

import numpy as np
import torch
from torch import Tensor

from hf_rnn_kernels.coding import exp_golomb
from hf_rnn_kernels.coding.payload import encode_tensor, join
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
    for exponent in exponents.unique().tolist() if rows.numel() else ():  # rows without columns have no curvature
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
