"""RMS normalisation: torch's own, and for large inputs on a CPU one pass in each direction."""

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.checks import refuse_forward_mode
from hf_rnn_kernels.perturbed import Perturbed
from hf_rnn_kernels.rms_norm import op, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    torch's `rms_norm` on a CPU is a chain of elementwise passes: in float32 this is used instead, which takes a quarter
    of the time (`python benchmarks/layers.py`).

    Args:
        x: (..., D), any floating dtype.
        weight: (D,).
        eps: added to the mean square.

    Returns:
        Like x.

    Raises:
        ValueError: weight does not fit x.
    """
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"weight: expected the last dimension of x, {tuple(x.shape[-1:])}, got {tuple(weight.shape)}")
    if isinstance(weight, Perturbed):
        return rms_norm(x, torch.ones_like(weight.base()), eps) * weight.over(x)
    if threads.worthwhile(x) and weight.dtype == torch.float32:
        refuse_forward_mode(x, weight)
        return op.forward(x, weight, eps)[0]
    return reference.rms_norm(x, weight, eps)
