"""Series with a trend, forecast by their differences, and how wide bands of quantiles become over the horizon.

The numbers are TiRex-2's (arXiv 2607.01204; `tirex-2` 0.4.0).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TREND = 0.87  # of the variance, from where on a line through the series is a trend
FEWEST = 4  # values that can have one
CONSTANT = 1e-12  # below this standard deviation a series has none

# By which a band's distance from the median is multiplied, and the power of the step by which it grows beside
LEVEL_BAND = 0.90**0.5, 0.02
DIFFERENCE_BAND = 1.68**0.5, 0.01


def has_trend(x: Tensor) -> Tensor:
    """Whether a straight line explains 0.87 of the variance of a row's values: (R, T), NaN where missing, to (R,).

    In float64. `tirex-2` asks for a slope of 1.5 deviations over the series, too, which no such line is below.
    """
    x = x.double()
    there = ~x.isnan()
    count = there.sum(1).clamp_min(1)
    t = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).expand_as(x)

    def centred(y):
        y = torch.where(there, y, 0.0)
        return torch.where(there, y - (y.sum(1) / count)[:, None], 0.0)

    x, t = centred(x), centred(t)
    variance = (x * x).sum(1)
    explained = (x * t).sum(1) ** 2 / ((t * t).sum(1) * variance).clamp_min(torch.finfo(x.dtype).tiny)
    varies = variance >= CONSTANT**2 * (count - 1)
    return (explained >= TREND) & varies & (there.sum(1) >= FEWEST)


def differences(x: Tensor, starts: Tensor) -> Tensor:
    """Each value less the one before it, 0 at the step (R,) where a row starts: (R, T), NaN where either is missing."""
    steps = torch.arange(x.shape[1], device=x.device)
    return F.pad(x.diff(dim=1), (1, 0), value=torch.nan).masked_fill(steps == starts[:, None], 0.0)


def last_values(x: Tensor) -> Tensor:
    """The last value that is there of each row, 0 where none is: (R, T) to (R,)."""
    steps = torch.arange(1, x.shape[1] + 1, device=x.device)
    last = ((~x.isnan()) * steps).argmax(1)
    return x.gather(1, last[:, None])[:, 0].nan_to_num(0.0)


def levels(steps: Tensor, last: Tensor, band: tuple[float, float] = (1.0, 0.0)) -> Tensor:
    """Quantiles of differences (R, T, Q) behind the value `last` (R,) to quantiles of values.

    Medians add up; distances from them as deviations of independent steps do, times band[0] t^band[1] at step t.
    """
    median = _median(steps)
    distance = steps - median
    spread = distance.square().cumsum(1).sqrt() * distance.sum(1, keepdim=True).sign()
    return last[:, None, None] + median.cumsum(1) + _widened(spread, *band)


def calibrated(values: Tensor) -> Tensor:
    """Quantiles of values (R, T, Q) with bands as wide as they should be."""
    median = _median(values)
    return median + _widened(values - median, *LEVEL_BAND)


def _median(quantiles: Tensor) -> Tensor:
    middle = quantiles.shape[2] // 2
    return quantiles[..., middle : middle + 1]


def _widened(distance: Tensor, factor: float, power: float) -> Tensor:
    t = torch.arange(1, distance.shape[1] + 1, dtype=distance.dtype, device=distance.device)
    return factor * t[:, None] ** power * distance
