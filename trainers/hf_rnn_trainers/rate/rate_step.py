"""The rate step on many tensors at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_rnn_kernels.coding import GeneralizedGaussian


def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here, sharing memory; a plain tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@torch.no_grad()
def moments(weights: Sequence[Tensor]) -> Tensor:
    """(len, 3) float64: sums of |w| and of w^2 and the number of weights, of each tensor over all of its shards."""
    sums = [torch.stack([whole(w.abs().sum(dtype=torch.float64)), whole(w.double().square().sum())]) for w in weights]
    counts = torch.tensor([w.numel() for w in weights], dtype=torch.float64)[:, None]
    return torch.cat([torch.stack(sums).cpu(), counts], 1)


def fit(sums: Tensor, scope: str) -> list[tuple[float, float]]:
    """(nu, root mean square) for each tensor, from its `moments`, or the same of all for every one."""
    rows = sums if scope == "tensor" else sums.sum(0, keepdim=True).expand_as(sums)
    means = (rows[:, :2] / rows[:, 2:].clamp(min=1)).tolist()
    return [(GeneralizedGaussian.from_moments(*mean).shape, mean[1] ** 0.5) for mean in means]


@torch.no_grad()
def shrink(weights: list[Tensor], fits: list[tuple[float, float]], sizes: list[float], epsilon: float) -> None:
    """w <- sign(w) max(|w| - size * nu * (|w| / r + epsilon)^(nu - 1), 0), in place; eight passes over the weights.

    Args:
        weights: any shapes, of one device.
        fits: (nu, r) of each.
        sizes: learning rate times multiplier, of each.
    """
    step = list(torch._foreach_abs(weights))
    torch._foreach_div_(step, [max(r, 1e-30) for _, r in fits])
    torch._foreach_add_(step, epsilon)
    torch._foreach_pow_(step, [nu - 1 for nu, _ in fits])
    torch._foreach_mul_(step, [size * nu for size, (nu, _) in zip(sizes, fits, strict=True)])
    _subtract_towards_zero(weights, step)


def _subtract_towards_zero(weights: list[Tensor], step: list[Tensor]) -> None:
    """w - clamp(w, -step, step): what is nearer to zero than its step becomes zero."""
    lower = torch._foreach_neg(step)
    torch._foreach_minimum_(step, weights)
    torch._foreach_maximum_(step, lower)
    torch._foreach_sub_(weights, step)


@torch.no_grad()
def published_step(weights: list[Tensor], nu: float, multiplier: float, total: int) -> None:
    """w <- w - lambda nu / N sign(w) (|w| + 1)^(nu - 1): as released, for comparison."""
    step = torch._foreach_abs(weights)
    torch._foreach_add_(step, 1.0)
    torch._foreach_pow_(step, nu - 1)
    torch._foreach_mul_(step, torch._foreach_sign(weights))
    torch._foreach_sub_(weights, step, alpha=multiplier * nu / total)
