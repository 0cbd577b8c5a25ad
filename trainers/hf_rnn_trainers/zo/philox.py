"""Philox4x32-10, a counter-based generator ("Parallel random numbers: as easy as 1, 2, 3", Salmon et al., SC 2011).

Random bits are a function of where they are used, with no state to carry: any part can be made anywhere, in any order.
"""

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS, _WEYL, _LOW = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> Tensor:
    """128 random bits for every counter.

    Args:
        counter: four int64 tensors of values in [0, 2^32), of shapes that broadcast.
        seed: 64 bits, the key.

    Returns:
        (*shape, 4) int64 of values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    shape = c0.shape
    if c0.device.type == "cpu":  # numpy's calls cost a fifth of torch's
        c0, c1, c2, c3 = (np.ascontiguousarray(c.numpy()) for c in (c0, c1, c2, c3))  # type: ignore[assignment]
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        # int64 products wrap around, which leaves their 64 bits what they are for unsigned numbers
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return torch.stack([torch.as_tensor(c) for c in (c0, c1, c2, c3)], -1).view(*shape, 4)


def signs(words: Tensor) -> Tensor:
    """-1 or 1 in int8 for every bit, the lowest first: (..., W) words to (..., 32 * W)."""
    octets = words.to(torch.int32).view(torch.uint8)
    bits = octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1
    return bits.flatten(-2).view(torch.int8) * 2 - 1


def normals(words: Tensor) -> Tensor:
    """Standard normal numbers in float64, one for two words (Box and Muller): (..., W) to (..., W / 2)."""
    u, v = words.double().unflatten(-1, (-1, 2)).add(0.5).div(2**32).unbind(-1)
    return torch.sqrt(-2 * torch.log(u)) * torch.cos(2 * torch.pi * v)


def sparse_signs(words: Tensor, density: float) -> Tensor:
    """-1 or 1 with probability `density`, else 0, in float32: one for each word, whose lowest bit is the sign."""
    return ((words & 1) * 2 - 1) * ((words >> 1) < density * 2**31).float()
