"""The gate in torch's own terms, any dtype and device."""

from torch import Tensor
from torch.nn import functional as F


def silu_gate(h: Tensor, gate: Tensor) -> Tensor:
    """h * SiLU(gate)."""
    return h * F.silu(gate)
