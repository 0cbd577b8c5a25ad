"""Forecasts as quantiles: (R, T, Q), from the lowest to the highest; the one in the middle is the forecast's median."""

from collections.abc import Sequence

import torch
from torch import Tensor

_SAME = 1e-6  # quantiles nearer than that are one, such as those that were float32 once


def pinball_loss(predictions: Tensor, values: Tensor, quantiles: Sequence[float], mask: Tensor) -> Tensor:
    """Mean of max(q (y - p), (q - 1) (y - p)) over quantiles q and what is there: the least at the true quantiles
    (Koenker and Bassett, 1978).

    Args:
        predictions: p, (R, T, Q).
        values: y, (R, T).
        quantiles: Q numbers in (0, 1).
        mask: (R, T) bool, False where y does not count, whatever stands there. The loss of nothing is 0.
    """
    q = torch.tensor(quantiles, dtype=predictions.dtype, device=predictions.device)
    error = torch.where(mask, values, 0.0)[..., None] - predictions
    loss = torch.maximum(q * error, (q - 1) * error)
    return (loss * mask[..., None]).sum() / (mask.sum() * len(quantiles)).clamp_min(1)


def at_quantiles(predictions: Tensor, quantiles: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """The forecast at other quantiles, linear between its own: (..., Q) to (..., len(wanted)).

    Raises:
        ValueError: one below the lowest or above the highest, which the forecast says nothing of.
    """
    low, high = quantiles[0], quantiles[-1]
    if outside := [w for w in wanted if not low - _SAME <= w <= high + _SAME]:
        raise ValueError(f"quantiles: expected what this model predicts, {low:g} to {high:g}, got {outside[0]:g}")
    if len(quantiles) == 1:
        return predictions.expand(*predictions.shape[:-1], len(wanted))
    own, new = (torch.tensor(x, dtype=torch.float64, device=predictions.device) for x in (quantiles, wanted))
    above = torch.searchsorted(own, new).clamp(1, len(quantiles) - 1)
    part = ((new - own[above - 1]) / (own[above] - own[above - 1])).to(predictions.dtype)
    return torch.lerp(predictions[..., above - 1], predictions[..., above], part)


def check_quantiles(quantiles: Sequence[float]) -> None:
    """Raise ValueError unless they rise within (0, 1)."""
    numbers = list(quantiles)
    if not numbers or sorted(set(numbers)) != numbers or not 0 < numbers[0] <= numbers[-1] < 1:
        raise ValueError(f"quantiles: expected numbers between 0 and 1 that rise, got {numbers}")


def is_symmetric(quantiles: Sequence[float]) -> bool:
    """Whether with each q there is 1 - q."""
    return all(abs(a + b - 1) < _SAME for a, b in zip(quantiles, reversed(quantiles), strict=True))
