"""Checks that several ops share."""

import itertools

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


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, time: int, name: str = "cu_seqlens") -> None:
    """Raise ValueError or TypeError unless `cu_seqlens` packs `time` rows of a batch of one.

    Reads the values (on a GPU that waits for the device) where they are known.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name}: expected shape (N + 1,) with N >= 1, got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"{name}: packed sequences lie in a batch of one, got a batch of {batch}")
    if not values_known(cu_seqlens):
        return  # on a CPU the operator checks them when it runs, the Triton kernels clamp them
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != time or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name}: expected offsets that rise from 0 to T = {time}, got {bounds}")


def check_scan(inputs: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Raise TypeError or ValueError unless the inputs are (B, T, channels) tensors of one shape, dtype and device that
    fit `mask` and `cu_seqlens`; return the number of sequences."""
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
    for name, other in [*others, ("mask", mask), ("cu_seqlens", cu_seqlens)]:
        if other is not None and other.device != first.device:
            raise ValueError(f"{name}: expected on the device of {first_name}, {first.device}, got {other.device}")
    batch, time, _ = first.shape
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, time)
    if mask is not None and mask.shape != (batch, time):
        raise ValueError(f"mask: expected shape (B, T) = {(batch, time)}, got {tuple(mask.shape)}")
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise RuntimeError for forward-mode differentiation, which torch would answer with zeros."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError("forward-mode differentiation (jvp): the scans and norms have backward formulas only")
