"""RMS normalisation in torch's own terms, any dtype and device."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
