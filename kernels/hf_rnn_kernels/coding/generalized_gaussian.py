"""The density of weights: p(x) = nu / (2 beta Gamma(1/nu)) exp(-(|x| / beta)^nu)."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SHAPE, MAX_SHAPE = 0.1, 3.0  # beyond, moments of weights tell nothing
_EXACT_BINS = 4096  # on each side of zero; beyond, a bin is small against the density's scale


@dataclass(frozen=True)
class GeneralizedGaussian:
    """Zero mean; `shape` nu is 2 for a Gaussian, 1 for a Laplacian, below 1 for a peak with heavy tails.

    Args:
        shape: nu > 0.
        scale: beta > 0, in units of x.
    """

    shape: float
    scale: float

    @classmethod
    def from_moments(cls, mean_abs: float, mean_square: float) -> "GeneralizedGaussian":
        """The one with these E|x| and E x^2: Gamma(1/nu) Gamma(3/nu) / Gamma(2/nu)^2 = E x^2 / (E|x|)^2, decreasing
        in nu (Sharifi and Leon-Garcia, 1995); nu is kept in [0.1, 3]. All zeros give nu = 0.1 and the smallest scale.
        """
        # The search below would answer for NaN, too.
        if not (math.isfinite(mean_abs) and math.isfinite(mean_square)):
            raise ValueError(f"mean_abs, mean_square: expected finite moments, got {mean_abs} and {mean_square}")
        if mean_abs == 0:
            return cls(MIN_SHAPE, torch.finfo(torch.float64).tiny)
        # By a table and a line between neighbours: the ratio has no inverse in closed form.
        grid, ratios = _ratios()
        ratio = torch.tensor(mean_square / mean_abs**2, dtype=torch.float64)
        at = torch.searchsorted(ratios, ratio).clamp(1, len(grid) - 1)
        low, high = ratios[at - 1], ratios[at]
        share = ((ratio - low) / (high - low)).clamp(0, 1)
        nu = float(grid[at - 1] + share * (grid[at] - grid[at - 1]))
        return cls(nu, mean_abs * math.exp(math.lgamma(1 / nu) - math.lgamma(2 / nu)))

    @classmethod
    def fit(cls, x: Tensor) -> "GeneralizedGaussian":
        """The one with the moments of a tensor."""
        magnitude = x.detach().double().abs()
        return cls.from_moments(float(magnitude.mean()), float(magnitude.square().mean()))

    def log_density(self, x: Tensor) -> Tensor:
        """Natural logarithm of p, in float64."""
        nu, beta = self.shape, self.scale
        return math.log(nu / (2 * beta)) - math.lgamma(1 / nu) - (x.double().abs() / beta) ** nu

    def upper_tail(self, x: Tensor) -> Tensor:
        """P(X > x) for x >= 0, without the cancellation of one minus a distribution function."""
        return (
            torch.special.gammaincc(torch.tensor(1 / self.shape).double(), (x.double() / self.scale) ** self.shape) / 2
        )

    def bits(self, step: float) -> float:
        """Entropy in bits of x rounded to multiples of `step`: what an ideal coder needs a weight.

        Bins are differences of the distribution function; far out, where a bin is narrow against the density,
        the density times the step, integrated in closed form.
        """
        nu, log_step = self.shape, math.log(step)
        edges = self.upper_tail((torch.arange(_EXACT_BINS + 1) + 0.5) * step)
        side = edges[:-1] - edges[1:]  # of k = 1, 2, ...
        centre = 1 - 2 * edges[0]
        # xlogy: an empty bin costs nothing, where 0 * log(0) would be NaN.
        nats = -torch.special.xlogy(centre, centre) - 2 * torch.special.xlogy(side, side).sum()
        start = torch.tensor((_EXACT_BINS + 0.5) * step / self.scale, dtype=torch.float64) ** nu
        mass = torch.special.gammaincc(torch.tensor(1 / nu).double(), start)
        energy = torch.special.gammaincc(torch.tensor(1 / nu + 1).double(), start) / nu  # of (x / beta)^nu
        log_peak = math.log(nu / (2 * self.scale)) - math.lgamma(1 / nu)
        return float(nats + energy - (log_peak + log_step) * mass) / math.log(2)


@functools.cache
def _ratios() -> tuple[Tensor, Tensor]:
    """nu on a grid, falling, and E x^2 / (E|x|)^2 of each, rising."""
    # Steps of 0.001.
    nu = torch.linspace(MAX_SHAPE, MIN_SHAPE, 2901, dtype=torch.float64)
    return nu, torch.exp(torch.lgamma(1 / nu) + torch.lgamma(3 / nu) - 2 * torch.lgamma(2 / nu))
