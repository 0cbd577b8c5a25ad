"""SwiGLU's elementwise part: torch's own, and for large inputs on a CPU one pass in each direction."""

from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.checks import refuse_forward_mode
from hf_rnn_kernels.swiglu import op, reference


def swiglu(x: Tensor) -> Tensor:
    """y = SiLU(gate) * up, where gate and up are the halves of the last dimension of x (Shazeer, arXiv 2002.05202).

    In float32 on a CPU one pass over x forward and one backward, whose gradient needs no concatenation of halves.

    Args:
        x: (..., 2 * D), any floating dtype.

    Returns:
        (..., D).

    Raises:
        ValueError: an odd last dimension.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension, gate and up, got {x.shape[-1]}")
    if threads.worthwhile(x):
        refuse_forward_mode(x)
        return op.forward(x)
    return reference.swiglu(x)
