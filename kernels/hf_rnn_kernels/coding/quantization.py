"""Weights as whole multiples of a step."""

import math

import torch
from torch import Tensor

MAX_SYMBOL = 2**24 - 1  # the last whole number that float32 holds with all its neighbours below


def quantize(x: Tensor, exponent: int, rate: float = 0.0, curvature: Tensor | None = None) -> Tensor:
    """q = round(x / 2^exponent), or what costs fewer bits nearby.

    Args:
        x: weights, any shape, floating dtype.
        exponent: of the step, a power of two, so that q * step is exact in float32.
        rate: Lagrange multiplier, in squared steps a bit: of the nearest multiple and the next towards zero, the one
            with the smaller (x / step - q)^2 + rate * bits(q) is taken, bits being the ideal code's over the tensor
            when rounded. 0 rounds.
        curvature: of x's shape, at least 0: how much an error matters, in any unit. The squared error of each weight
            counts as many times as its curvature is of the mean. None: the same everywhere.

    Returns:
        int32, of x's shape.

    Raises:
        ValueError: a weight that is not finite, or 2^24 steps and more from zero; a bad rate or curvature.
    """
    check_range(x, exponent)
    check_rate(rate, x, curvature)
    ratio = x.detach().float() * 2.0**-exponent
    q = ratio.round().int()
    if rate <= 0:
        return q
    bits, low = symbol_bits(q)
    # An empty bin would cost more than any other: a code for one symbol among all
    bits = torch.where(torch.isinf(bits), math.log2(max(q.numel(), 2)), bits).to(q.device)
    towards_zero = q - q.sign()
    error, error_towards_zero = (ratio - q).square(), (ratio - towards_zero).square()
    if curvature is not None and float(curvature.sum()) > 0:
        c = curvature.detach().to(q.device, torch.float32)
        error, error_towards_zero = c / c.mean() * error, c / c.mean() * error_towards_zero
    cost = error + rate * bits[q - low]
    cost_towards_zero = error_towards_zero + rate * bits[towards_zero - low]
    return torch.where(cost_towards_zero < cost, towards_zero, q)


def check_range(x: Tensor, exponent: int, most: int = MAX_SYMBOL) -> None:
    """Raise what `quantize` raises of weights more than `most` steps from zero."""
    limit = float(x.detach().abs().max()) * 2.0**-exponent if x.numel() else 0.0
    if not math.isfinite(limit):
        raise ValueError("x: expected finite weights, got NaN or infinity")
    if limit > most:
        bound = f"2^{(most + 1).bit_length() - 1}"
        raise ValueError(f"exponent: a weight is {limit:.3g} steps of 2^{exponent} from zero; expected below {bound}")


def check_rate(rate: float, x: Tensor, curvature: Tensor | None) -> None:
    """Raise what `quantize` raises of these."""
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate: expected a finite number of at least 0, got {rate}")
    if curvature is None:
        return
    if curvature.shape != x.shape:
        raise ValueError(f"curvature: expected the weights' shape {tuple(x.shape)}, got {tuple(curvature.shape)}")
    if curvature.numel() and not (float(curvature.min()) >= 0 and math.isfinite(float(curvature.sum()))):
        raise ValueError("curvature: expected finite numbers of at least 0")


def dequantize(q: Tensor, exponent: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * 2^exponent: exact in float32, rounded once to another dtype."""
    return (q.float() * 2.0**exponent).to(dtype)


def symbol_bits(q: Tensor) -> tuple[Tensor, int]:
    """The ideal code's bits for each symbol from the smallest (or 0) to the largest (or 0), float64, and the smallest;
    infinite for one that does not occur. A range over 2^24 is refused by `quantize`."""
    low = min(int(q.min()), 0) if q.numel() else 0
    counts = torch.bincount((q.flatten() - low).long(), minlength=1 - low).double()
    return -torch.log2(counts / max(q.numel(), 1)), low


def entropy(q: Tensor) -> float:
    """Order-0 entropy of the symbols, bits each."""
    if not q.numel():
        return 0.0
    bits, _ = symbol_bits(q)
    p = torch.exp2(-bits)
    return float(torch.where(p > 0, p * bits, torch.zeros(())).sum())
