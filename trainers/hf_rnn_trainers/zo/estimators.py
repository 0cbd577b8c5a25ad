"""From losses at perturbed weights to the coefficients c of the estimate g = sum_j c_j delta_j."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def central_difference(losses: Tensor, epsilon: float, exponent: float) -> Tensor:
    """(L(w + eps delta) - L(w - eps delta)) / (2 eps): CD-RGE, SPSA. Error O(eps^2)."""
    return (losses[:, 0] - losses[:, 1]) / (2 * epsilon)


def forward_difference(losses: Tensor, epsilon: float, exponent: float) -> Tensor:
    """(L(w + eps delta) - L(w)) / eps: half the evaluations, error O(eps)."""
    return (losses[:, 0] - losses[:, 1]) / epsilon


def spsa15(losses: Tensor, epsilon: float, exponent: float) -> Tensor:
    """Central differences over max(|L+ - 2 L + L-| / eps^2, 1)^exponent, smaller steps where the loss bends (1.5-SPSA).

    The curvature along a direction is mostly the trace of the Hessian, the same for all: a step size, no more.
    """
    plus, minus, clean = losses.unbind(1)
    curvature = (plus - 2 * clean + minus).abs() / epsilon**2
    return (plus - minus) / (2 * epsilon) / (curvature**exponent).clamp(min=1.0)


def sign(losses: Tensor, epsilon: float, exponent: float) -> Tensor:
    """-1, 0 or 1, the better of two opposite directions: steps do not depend on the scale of the loss."""
    return (losses[:, 0] - losses[:, 1]).sign()


def rank(losses: Tensor, epsilon: float, exponent: float) -> Tensor:
    """Difference of the two losses' ranks among all, from -1 to 1 (Salimans et al., arXiv 1703.03864)."""
    ranks = torch.unique(losses, return_inverse=True)[1].double()  # equal losses, equal ranks
    return (ranks[:, 0] - ranks[:, 1]) / max(float(ranks.max()), 1.0)


class Estimator(NamedTuple):
    signs: tuple[int, ...]  # of epsilon at which each direction's loss is taken, 0 for the weights themselves
    coefficients: Callable[[Tensor, float, float], Tensor]  # losses (N, len(signs)) in float64 to (N,)


ESTIMATORS = {
    "cd": Estimator((1, -1), central_difference),
    "fd": Estimator((1, 0), forward_difference),
    "spsa15": Estimator((1, -1, 0), spsa15),
    "es_sign": Estimator((1, -1), sign),
    "es_rank": Estimator((1, -1), rank),
}


def estimate(name: str, losses: Tensor, epsilon: float, exponent: float) -> Tensor:
    """c (N,) in float32, as it is logged, the mean over the directions whose losses are all finite; zero for others."""
    finite = losses.isfinite().all(1)
    c = losses.new_zeros(losses.shape[0])
    if finite.any():
        c[finite] = ESTIMATORS[name].coefficients(losses[finite], epsilon, exponent) / finite.sum()
    return c.float()
