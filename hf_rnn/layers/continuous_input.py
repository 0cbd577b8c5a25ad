"""Inputs that are numbers: sensors, features of sound, series."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_rnn.layers.residual_mlp import ResidualMLP
from hf_rnn_kernels.checks import values_known


class ContinuousInput(nn.Module):
    """f([x * observed, missing]) of the values of `patch_size` steps side by side: (B, T, F) to (B, T / P, D).

    Args:
        num_features: F, values of a step.
        channels: D.
        patch_size: P, consecutive steps that make one token, ceil(T / P) in all.
        hidden: channels of the `ResidualMLP` that f is; None: f is linear.
    """

    def __init__(self, num_features: int, channels: int, patch_size: int = 1, hidden: int | None = None):
        super().__init__()
        self.patch_size, inputs = patch_size, 2 * patch_size * num_features
        self.proj = nn.Linear(inputs, channels) if hidden is None else ResidualMLP(inputs, hidden, channels)

    def forward(self, x: Tensor, observed: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, F) floating values to (B, ceil(T / P), D).

        Args:
            observed: (B, T, F), zeros where a value is missing, ones elsewhere; None: none is.
            mask: (B, T) bool, False at padding, whose values are missing.

        Raises:
            TypeError, ValueError: `input_features` or `observed_mask` of another type or shape; NaN or infinity where
                a value is there (on a CPU, as ids are checked, where reading values stalls nothing).
        """
        if not x.is_floating_point():
            raise TypeError(f"input_features: expected floating numbers, got {x.dtype}")
        there = torch.ones_like(x, dtype=torch.bool) if observed is None else _observed(observed, x)
        there = there if mask is None else there & mask[..., None]
        x = torch.where(there, x, 0.0).to(next(self.proj.parameters()).dtype)
        _check_finite(x)  # of the dtype that is computed in, which may be narrower
        x, there = patches(x, mask, self.patch_size), patches(there, mask, self.patch_size)
        return self.proj(torch.cat([x, (~there).to(x.dtype)], -1).flatten(2))


def patches(x: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """(B, T, ...) to (B, ceil(T / size), size, ...), zeros behind the end. A row's patches are counted from its first
    real step, so that padding in front of it moves no step to another."""
    count = (x.shape[1] + size - 1) // size
    if size > 1:
        x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, count * size - x.shape[1]])
    if size > 1 and mask is not None:
        first = mask.int().argmax(1) % size
        steps = first[:, None] + torch.arange(count * size, device=x.device)
        x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, size])[torch.arange(x.shape[0], device=x.device)[:, None], steps]
    return x.unflatten(1, (count, size))


def real_patches(mask: Tensor, size: int) -> Tensor:
    """(B, T) bool, False at padding, to (B, ceil(T / size)): a patch is real if any of its steps is."""
    return patches(mask, mask, size).any(2)


def ends_inside_patch(steps: int, mask: Tensor | None, size: int) -> bool:
    """Whether the last patch of a row has fewer steps, (B, steps) bool False at padding; of a mask whose values are not
    known: no."""
    if mask is None or not values_known(mask):
        return mask is None and steps % size > 0
    return bool(((steps - mask.int().argmax(1)) % size).any())


def _observed(observed: Tensor, x: Tensor) -> Tensor:
    if observed.shape != x.shape:
        raise ValueError(
            f"observed_mask: expected the shape of input_features, {tuple(x.shape)}, got {tuple(observed.shape)}"
        )
    there = observed.bool()
    if there.device.type == "cpu" and values_known(there) and not bool((observed == there).all()):
        raise ValueError("observed_mask: expected zeros where a value is missing and ones elsewhere, got other values")
    return there


def _check_finite(x: Tensor) -> None:
    finite = x.isfinite()
    if x.device.type == "cpu" and values_known(finite) and not bool(finite.all()):
        row, step, feature = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"input_features: expected finite values where observed_mask and attention_mask mark none as missing, got "
            f"{x[row, step, feature]:g} in row {row}, step {step}, feature {feature}"
        )
