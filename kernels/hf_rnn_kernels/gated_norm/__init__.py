"""The mLSTM's output: each head normalised, then an output gate. torch's own, and fused for large inputs on a CPU."""

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.checks import refuse_forward_mode
from hf_rnn_kernels.gated_norm import op, reference
from hf_rnn_kernels.perturbed import Perturbed


def gated_norm(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = sigmoid(gate) * weight * (h - mean(h)) / sqrt(var(h) + eps), mean and variance of each head (xLSTM-7B).

    In float32 on a CPU one pass forward and one backward, which computes sigmoid and norm again.

    Args:
        h: (..., H, P), any floating dtype. gate: (..., H * P). weight: (H * P,).
        eps: added to the variance.

    Returns:
        (..., H * P).

    Raises:
        ValueError: shapes that do not fit.
    """
    if gate.shape != (*h.shape[:-2], h.shape[-2] * h.shape[-1]):
        raise ValueError(
            f"gate: expected h with its heads joined, {tuple(h.flatten(-2).shape)}, got {tuple(gate.shape)}"
        )
    if weight.shape != gate.shape[-1:]:
        raise ValueError(f"weight: expected shape {tuple(gate.shape[-1:])}, got {tuple(weight.shape)}")
    if isinstance(weight, Perturbed):
        return gated_norm(h, gate, torch.ones_like(weight.base()), eps) * weight.over(gate)
    if threads.worthwhile(h) and gate.dtype == weight.dtype == torch.float32:
        refuse_forward_mode(h, gate, weight)
        return op.forward(h, gate, weight, eps)
    return reference.gated_norm(h, gate, weight, eps)
