"""Series of any size as numbers around 0, and back."""

from typing import NamedTuple

import torch
from torch import Tensor

_STEEPEST = 20.0  # sinh of more is beyond what a series comes to


class Scaling(NamedTuple):
    """z = arcsinh((x - loc) / scale) of each row, or without the arcsinh.

    Attributes:
        loc, scale: (R, 1).
        linear: (R, 1) bool, True where there is no arcsinh.
    """

    loc: Tensor
    scale: Tensor
    linear: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x (R, T), NaN where a value is missing, to z (R, T)."""
        z = (x - self.loc) / self.scale
        return torch.where(self.linear, z, torch.arcsinh(z))

    def undo(self, z: Tensor) -> Tensor:
        """z (R, T, Q) to x (R, T, Q); |z| is taken as 20 at most under the sinh."""
        loc, scale, linear = (x[..., None] for x in self)
        return torch.where(linear, z, torch.sinh(z.clamp(-_STEEPEST, _STEEPEST))) * scale + loc


def standardize(x: Tensor, use_arcsinh: bool = True, binary_aware: bool = True, eps: float = 1e-8) -> Scaling:
    """The scaling by mean and standard deviation of each row's values that are there.

    Args:
        x: (R, T) floating, NaN where a value is missing; a row of nothing else has mean 0, deviation 1.
        use_arcsinh: what is far from the mean is brought nearer.
        binary_aware: rows of nothing but 0 and 1 stay as they are.
        eps: the smallest deviation, that of constant series.
    """
    loc = x.nanmean(1, keepdim=True).nan_to_num(0.0)
    scale = ((x - loc) ** 2).nanmean(1, keepdim=True).sqrt().nan_to_num(1.0).clamp_min(eps)
    linear = torch.full_like(loc, not use_arcsinh, dtype=torch.bool)
    if binary_aware:
        binary = ((x == 0) | (x == 1) | x.isnan()).all(1, keepdim=True)
        loc, scale, linear = loc.masked_fill(binary, 0.0), scale.masked_fill(binary, 1.0), linear | binary
    return Scaling(loc, scale, linear)
