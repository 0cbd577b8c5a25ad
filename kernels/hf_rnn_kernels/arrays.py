"""Tensors as numba's loops see them, and the memory of large ones."""

import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

_LARGE, _PAGE = 2**25, 2**21  # bytes: from where on malloc no longer recycles memory; a huge page
_KEPT = 2**29  # bytes that are kept for large tensors to come, at most
_spare: deque[np.ndarray] = deque()  # the oldest first


def flat(x: Tensor) -> np.ndarray:
    """A tensor as a flat float32 array; a copy only where it is not one already."""
    return x.detach().float().reshape(-1).numpy()


def rows_apart(x: Tensor) -> tuple[np.ndarray, np.uint64]:
    """(rows, ...) as a flat float32 array that begins at its first element, and how far apart its rows are in it; a
    copy only where a row is not dense, or of another dtype."""
    x = x.detach().float()
    if not x[:1].is_contiguous():
        x = x.contiguous()
    extent = max(x.shape[0] - 1, 0) * x.stride(0) + x[:1].numel()
    return x.as_strided((extent,), (1,)).numpy(), np.uint64(x.stride(0))


def empty(*shape: int) -> Tensor:
    """Uninitialised float32 tensor.

    A large one is given back to `_spare` when the last tensor that shares its memory is gone, and serves the next that
    fits: fresh memory costs more than a recurrence (docs/log.md, 2026-11-22). It comes from numpy, which asks the
    system for huge pages.
    """
    count = int(np.prod(shape))
    if count * 4 < _LARGE:
        return torch.empty(shape)
    # In whole huge pages, so that tensors of about the same size serve each other. 64 MiB of fresh memory cost 5 ms in
    # them, 26 in small ones.
    buffer = _take(-(-count * 4 // _PAGE) * _PAGE)
    array = buffer[:count].reshape(shape)
    # At exit the memory goes with the process, and `_spare` may be gone before.
    weakref.finalize(array, _give_back, buffer).atexit = False
    return torch.from_numpy(array)


def _take(size: int) -> np.ndarray:
    """The newest spare buffer of `size` to twice as many bytes, or a new one. Each call of the deque is atomic: no
    lock, for which a finalizer that runs in between could wait forever."""
    for _ in range(len(_spare)):
        try:
            buffer = _spare.pop()
        except IndexError:  # another thread took it
            break
        # Not one much too large, which the tensor it was made for will want again.
        if size <= buffer.nbytes <= 2 * size:
            return buffer
        _spare.appendleft(buffer)
    return np.empty(size // 4, np.float32)


def _give_back(buffer: np.ndarray) -> None:
    _spare.append(buffer)
    while sum(b.nbytes for b in list(_spare)) > _KEPT:
        _spare.popleft()
