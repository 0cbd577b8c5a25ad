"""Checks that several ops share."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from hf_rnn_kernels.transforms import transforming


def values_known(x: Tensor) -> bool:
    """Whether Python may go by the values of this result: not under torch.compile, torch.func's transforms and
    FakeTensorMode, nor on the meta device; and not in torch.jit.trace, which would keep them for other inputs."""
    unknown = torch.compiler.is_compiling() or torch.jit.is_tracing() or transforming()
    return not (unknown or isinstance(x, FakeTensor) or x.is_meta)


def check_inputs(inputs: dict[str, Tensor], mask: Tensor | None, offsets: Tensor | None) -> int:
    """Raise TypeError or ValueError unless the inputs are (B, T, channels) tensors of one shape, dtype and device that
    fit a layout's `mask` and `offsets`, of which no values are read; return the number of sequences."""
    (first_name, first), *others = inputs.items()
    if first.dim() != 3:
        raise ValueError(f"{first_name}: expected shape (B, T, D), got {tuple(first.shape)}")
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{first_name}: expected float32, bfloat16, float16 or float64, got {first.dtype}")
    for name, x in others:
        if x.shape != first.shape:
            raise ValueError(f"{name}: expected the shape of {first_name}, {tuple(first.shape)}, got {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {first_name}, {first.dtype}, got {x.dtype}")
    for name, other in [*others, ("layout.mask", mask), ("layout.offsets", offsets)]:
        if other is not None and other.device != first.device:
            raise ValueError(f"{name}: expected on the device of {first_name}, {first.device}, got {other.device}")
    if mask is not None and mask.shape != first.shape[:2]:
        raise ValueError(f"layout.mask: expected shape (B, T) = {tuple(first.shape[:2])}, got {tuple(mask.shape)}")
    return first.shape[0] if offsets is None else offsets.shape[0] - 1


def check_tensors(expected: dict[str, tuple[Tensor | None, tuple[int, ...]]], like: Tensor, like_name: str) -> None:
    """Raise ValueError or TypeError unless each tensor that there is has its shape, a floating dtype and `like`'s
    device."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{name}: expected on the device of {like_name}, {like.device}, got {tensor.device}")


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise RuntimeError for forward-mode differentiation, which torch would answer with zeros."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # nobody differentiates so: the usual case
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("forward-mode differentiation (jvp): the scans and norms have backward formulas only")
