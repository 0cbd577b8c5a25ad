"""The rate step on many tensors at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_rnn_kernels.coding import GeneralizedGaussian
from hf_rnn_kernels.threads import worthwhile


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
def shrink(
    weights: list[Tensor],
    fits: list[tuple[float, float]],
    sizes: list[float],
    epsilon: float,
    keep_norm: Sequence[bool] | None = None,
) -> None:
    """w <- c sign(w) max(|w| - size * nu * (|w| / r + epsilon)^(nu - 1), 0), in place.

    c gives each tensor its norm back, as far as doubling can. Without it most of what is saved is scale, which norms
    and gains elsewhere make up for: the same bits buy less precision (docs/log.md, 2026-11-26).

    Args:
        weights: any shapes, of one device; of a sharded tensor each process changes its part.
        fits: (nu, r) of each.
        sizes: learning rate times multiplier, of each.
        keep_norm: whether c is applied, to each; None: to all. A difference has no norm to keep.
    """
    rest = []
    norms = [True] * len(weights) if keep_norm is None else keep_norm
    for w, (nu, r), size, keep in zip(weights, fits, sizes, norms, strict=True):
        if type(w) is Tensor and worthwhile(w) and w.is_contiguous():
            from hf_rnn_kernels.coding import shrink_cpu  # which takes a while

            squares, left = shrink_cpu.shrink(w.view(-1).numpy(), nu, max(r, 1e-30), size, epsilon)
            if keep:
                w.mul_(min((squares / max(left, 1e-60)) ** 0.5, 2.0))
        else:
            rest.append((w, (nu, r), size, keep))
    if rest:
        _shrink_together(rest, epsilon)


def _shrink_together(rest: list[tuple[Tensor, tuple[float, float], float, bool]], epsilon: float) -> None:
    """The same of several tensors at once: each with its fit, its size and whether it keeps its norm."""
    weights, fits, sizes = [w for w, *_ in rest], [fit for _, fit, *_ in rest], [size for *_, size, _ in rest]
    parts = [local(w) for w in weights]
    step = list(torch._foreach_abs(parts))
    torch._foreach_div_(step, [max(r, 1e-30) for _, r in fits])
    torch._foreach_add_(step, epsilon)
    torch._foreach_pow_(step, [nu - 1 for nu, _ in fits])
    torch._foreach_mul_(step, [size * nu for size, (nu, _) in zip(sizes, fits, strict=True)])
    kept = [w for w, *_, keep in rest if keep]
    before = [_norm(w) for w in kept]
    lower = torch._foreach_neg(step)
    torch._foreach_minimum_(step, parts)
    torch._foreach_maximum_(step, lower)
    torch._foreach_sub_(parts, step)  # what is nearer to zero than its step becomes zero
    for w, norm in zip(kept, before, strict=True):
        local(w).mul_((norm / _norm(w).clamp(min=1e-30)).clamp(max=2.0).to(w.dtype))


def _norm(w: Tensor) -> Tensor:
    """Over all shards, in float32 at least: the squares of float16 weights are too small for it."""
    return whole(torch.linalg.vector_norm(w, dtype=torch.promote_types(w.dtype, torch.float32)))


@torch.no_grad()
def published_step(weights: list[Tensor], nu: float, multiplier: float, total: int) -> None:
    """w <- w - lambda nu / N sign(w) (|w| + 1)^(nu - 1): as released, for comparison."""
    step = torch._foreach_abs(weights)
    torch._foreach_add_(step, 1.0)
    torch._foreach_pow_(step, nu - 1)
    torch._foreach_mul_(step, torch._foreach_sign(weights))
    torch._foreach_sub_(weights, step, alpha=multiplier * nu / total)
