"""The equations in plain torch: any device, any float dtype."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (M, N, I) to (M, N, O)."""
    y = torch.nn.functional.linear(x, weight)
    return y.add_(low_rank(x, left, right))


def embedding(ids: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """ids (M, N) to (M, N, O)."""
    chosen = left.gather(1, ids[..., None].expand(-1, -1, left.shape[2]))
    return torch.nn.functional.embedding(ids, weight).add_(outer(chosen, right))


def low_rank(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(x right) left^T: (M, N, I) to (M, N, O)."""
    return outer(torch.bmm(x, right.to(x.dtype)), left)


def outer(u: Tensor, left: Tensor) -> Tensor:
    """u left^T: (M, N, K) and (M, O, K) to (M, N, O)."""
    left = left.to(u.dtype)
    return u * left.transpose(1, 2) if u.shape[2] == 1 else torch.bmm(u, left.transpose(1, 2))
