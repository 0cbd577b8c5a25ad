"""Tensors as numba's loops see them, and the memory of large ones."""

import contextlib
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

_LARGE, _PAGE = 2**25, 2**21  # bytes: from where on malloc no longer recycles memory; a huge page
_KEPT = 2**30  # bytes that are kept for the next large tensor at most
_spare: defaultdict[int, list[np.ndarray]] = defaultdict(list)


def flat(x: Tensor) -> np.ndarray:
    """A tensor as a flat float32 array; a copy only where it is not one already."""
    return x.detach().float().reshape(-1).numpy()


def empty(*shape: int) -> Tensor:
    """Uninitialised float32 tensor.

    A large one goes back into `_spare` when the last tensor that shares its memory is gone, and serves the next of its
    size: fresh memory costs more than a recurrence (docs/log.md, 2026-11-22). It comes from numpy, which asks the
    system for huge pages.
    """
    count = int(np.prod(shape))
    if count * 4 < _LARGE:
        return torch.empty(shape)
    size = -(-count * 4 // _PAGE) * _PAGE
    buffer = None
    with contextlib.suppress(IndexError):
        buffer = _spare[size].pop()
    if buffer is None:
        buffer = np.empty(size // 4, np.float32)
    array = buffer[:count].reshape(shape)
    weakref.finalize(array, _give_back, buffer).atexit = False
    return torch.from_numpy(array)


def _give_back(buffer: np.ndarray) -> None:
    if sum(b.nbytes for spare in list(_spare.values()) for b in list(spare)) + buffer.nbytes <= _KEPT:
        _spare[buffer.nbytes].append(buffer)
