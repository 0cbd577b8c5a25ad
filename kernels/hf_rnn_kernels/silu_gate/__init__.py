"""The gate of the gated layout: torch's own, and for large inputs on a CPU one pass in each direction."""

from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.checks import refuse_forward_mode
from hf_rnn_kernels.silu_gate import op, reference


def silu_gate(h: Tensor, gate: Tensor) -> Tensor:
    """y = h * SiLU(gate), the output gate of Mamba (arXiv 2312.00752).

    In float32 on a CPU one pass forward and one backward, which computes SiLU again.

    Args:
        h, gate: any shape, the same; any floating dtype.

    Returns:
        Of that shape.

    Raises:
        ValueError: shapes that differ.
    """
    if h.shape != gate.shape:
        raise ValueError(f"gate: expected the shape of h, {tuple(h.shape)}, got {tuple(gate.shape)}")
    if threads.worthwhile(h) and gate.dtype == h.dtype:
        refuse_forward_mode(h, gate)
        return op.forward(h, gate)
    return reference.silu_gate(h, gate)
