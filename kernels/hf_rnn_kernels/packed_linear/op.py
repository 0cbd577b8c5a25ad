"""`hf_rnn::packed_linear`: a product with packed weights, a block of them unpacked at a time."""

from types import ModuleType

from torch import Tensor

from hf_rnn_kernels.operators import backend, operator
from hf_rnn_kernels.packed_linear import reference


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """y = W x with W = `unpack(packed, scale, bits)`; gradients flow to x alone.

    Args:
        x: (..., I), any floating dtype, in which y comes, too.
        packed, scale, bits: see `pack`.

    Returns:
        (..., O).

    Raises:
        ValueError: shapes that do not fit each other.
    """
    inputs = packed.shape[-1] * 8 // bits
    if x.shape[-1] != inputs:
        raise ValueError(f"x: expected (..., {inputs}), got {tuple(x.shape)}")
    if packed.dim() != 2 or scale.dim() != 2 or scale.shape[0] != packed.shape[0] or inputs % scale.shape[1]:
        raise ValueError(
            f"scale: expected (O, I / group_size) beside packed {tuple(packed.shape)}, got {tuple(scale.shape)}"
        )
    return forward(x.flatten(0, -2), packed, scale, bits).unflatten(0, x.shape[:-1])


def _backend(x: Tensor) -> ModuleType:
    """Other devices unpack in plain torch."""
    return backend(__package__, x) if x.device.type == "cpu" else reference


def _backward_shapes(grad, packed, scale, bits):
    return grad.new_empty(grad.shape[0], packed.shape[1] * 8 // bits)


@operator("packed_linear_backward", fake=_backward_shapes)
def backward(grad: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The gradient of x: grad (N, O) times W."""
    return _backend(grad).backward(grad, packed, scale, bits)


def _shapes(x, packed, scale, bits):
    return x.new_empty(x.shape[0], packed.shape[0])


def _save(ctx, inputs, output) -> None:
    _, packed, scale, ctx.bits = inputs
    ctx.save_for_backward(packed, scale)


def _backward(ctx, grad):
    return backward(grad, *ctx.saved_tensors, ctx.bits), None, None, None


@operator("packed_linear", fake=_shapes, backward=_backward, save=_save)
def forward(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x (N, I) to (N, O)."""
    return _backend(x).forward(x, packed, scale, bits)
