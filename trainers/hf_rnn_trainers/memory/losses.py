"""The terms of the SMT loss, in float32 whatever the networks compute in. N sequences, K memory tokens, D channels."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def prediction_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (..., V) and (...) over the targets that are not -100; 0 where there is none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    return losses / (targets != -100).sum().clamp(min=1)


def known(loss: Tensor, targets: Tensor) -> Tensor:
    """The loss to be logged: NaN where there is nothing to predict, which is left out of means."""
    return torch.where((targets != -100).any(), loss, float("nan"))


def dynamics_loss(predicted: Tensor, memory: Tensor) -> Tensor:
    """Mean square over all channels of (N, K, D): 2 between independent memories on their spheres; 0 where N is."""
    if predicted.numel() == 0:
        return predicted.sum().float()
    return F.mse_loss(predicted.float(), memory.float())


def uniformity_loss(tokens: Tensor, sample: int = 512, generator: torch.Generator | None = None) -> Tensor:
    """log mean exp(-2 |a - b|^2) over pairs of `sample` directions of (..., D) (Wang and Isola, arXiv 2005.10242).

    0 where all point one way, or there is one alone; -4 where two are independent in many dimensions. As a logarithm of
    a sum of exponentials, so that nothing underflows.
    """
    directions = F.normalize(tokens.float().flatten(0, -2), dim=-1)
    if len(directions) > sample:
        chosen = torch.randperm(len(directions), generator=generator)[:sample]
        directions = directions[chosen.to(directions.device)]
    if len(directions) < 2:
        return directions.sum() * 0
    exponents = -2 * torch.pdist(directions).square()
    return exponents.logsumexp(0) - math.log(len(exponents))
