"""Tensors as numba's loops see them."""

import numpy as np
import torch
from torch import Tensor


def flat(x: Tensor) -> np.ndarray:
    """A tensor as a flat float32 array; a copy only where it is not one already."""
    return x.detach().float().reshape(-1).numpy()


def empty(*shape: int) -> Tensor:
    """Uninitialised float32 tensor. From 32 MiB on, where malloc no longer recycles memory, page faults cost more than
    a recurrence: numpy asks for huge pages, which spares most of them (docs/log.md, 2026-11-22)."""
    if np.prod(shape) * 4 < 2**25:
        return torch.empty(shape)
    return torch.from_numpy(np.empty(shape, np.float32))
