"""A memory that a multi-layer perceptron rewrites at every step, without gates: the recurrence of `MemoryRNN`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_rnn_kernels.checks import check_inputs, check_tensors, refuse_forward_mode
from hf_rnn_kernels.mlp_scan import op
from hf_rnn_kernels.transforms import tracked


def mlp_scan(
    x: Tensor,
    memory: Tensor,
    in_weight: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """a_0 = x_t + W m_{t-1}, a_l = a_{l-1} + V_l norm(gelu(a_{l-1})) + b_l, m_t = norm(U gelu(a_L) + u), each memory
    token normalised for itself; norm(y) = y / sqrt(mean(y^2) + eps), eps of the last one float32's (float64's)
    resolution.

    Steps write to memory that is there for all of them, and the gradients of the weights are one product each, over all
    steps, where autograd's loop adds to them at every step.

    Args:
        x: (B, T, S), float32 or float64: the token's part of a_0, bias included.
        memory: (B, K, D), before the first token.
        in_weight: W, (S, K * D).
        weights, biases: V_l, (S, S), the weights of norms multiplied into their columns, and b_l, (S,); no biases for
            zeros.
        out_weight, out_bias: U, (K * D, S), and u, (K * D,) or None.
        mask: (B, T) bool, False where nothing is read: the memory stays. None: all is read.
        eps: of the inner norms.

    Returns:
        Memories after each token, (B, T, K, D).

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    check_inputs({"x": x}, mask, None)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected float32 or float64, got {x.dtype}")
    if memory.dim() != 3:
        raise ValueError(f"memory: expected shape (B, K, D), got {tuple(memory.shape)}")
    if len(biases) not in (0, len(weights)):
        raise ValueError(f"biases: expected one for each of {len(weights)} weights, or none, got {len(biases)}")
    size, width = x.shape[2], memory.shape[1] * memory.shape[2]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "memory": (memory, (x.shape[0], *memory.shape[1:])),
        "in_weight": (in_weight, (size, width)),
        "out_weight": (out_weight, (width, size)),
        "out_bias": (out_bias, (width,)),
    }
    expected |= {f"weights[{n}]": (weight, (size, size)) for n, weight in enumerate(weights)}
    expected |= {f"biases[{n}]": (bias, (size,)) for n, bias in enumerate(biases)}
    check_tensors(expected, x, "x")
    for name, (tensor, _) in expected.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
    tensors = x, memory, in_weight, *weights, *biases, out_weight, out_bias
    refuse_forward_mode(*tensors)
    memories, *_ = op.scan(
        x, memory, in_weight, [*weights], [*biases], out_weight, out_bias, mask, eps, tracked(*tensors)
    )
    return memories.transpose(0, 1)
