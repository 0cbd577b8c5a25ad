"""The equation of mlp_scan, step by step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def scan(
    x: Tensor,
    memory: Tensor,
    in_weight: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    """Memories after each token, (B, T, K, D)."""
    memories = []
    for t in range(x.shape[1]):
        a = x[:, t] + F.linear(memory.flatten(1), in_weight)
        for n, weight in enumerate(weights):
            a = a + F.linear(F.rms_norm(F.gelu(a), a.shape[-1:], eps=eps), weight, biases[n] if biases else None)
        new = F.linear(F.gelu(a), out_weight, out_bias).view_as(memory)
        new = F.rms_norm(new, new.shape[-1:])
        memory = new if mask is None else torch.where(mask[:, t, None, None], new, memory)
        memories.append(memory)
    return torch.stack(memories, 1)
