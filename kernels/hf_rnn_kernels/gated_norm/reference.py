"""The gated norm in torch's own terms, any dtype and device."""

import torch
from torch import Tensor


def gated_norm(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = sigmoid(gate) * weight * norm(h), each head normalised: (..., H, P) to (..., H * P)."""
    return torch.sigmoid(gate) * (torch.nn.functional.layer_norm(h, h.shape[-1:], eps=eps).flatten(-2) * weight)
