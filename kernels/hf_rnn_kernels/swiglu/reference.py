"""SwiGLU's elementwise part in torch's own terms, any dtype and device."""

import torch
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) * up, the halves of the last dimension of x."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up
