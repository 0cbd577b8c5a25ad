"""A line search for the learning rate."""

import math
from collections.abc import Callable


def best_rate(loss: Callable[[float], float], low: float, high: float, points: int, rounds: int) -> float:
    """The rate with the least loss among `points` from `low` to `high`, equally far apart in their logarithms, then
    among as many between the neighbours of the best, `rounds` times.

    Raises:
        ValueError: no rate has a loss below that of rate zero.
    """
    tried: dict[float, float] = {}
    for _ in range(rounds):
        for k in range(points):
            rate = low * (high / low) ** (k / (points - 1))
            value = loss(rate)
            tried[rate] = value if math.isfinite(value) else math.inf
        rates = sorted(tried)
        at = min(range(len(rates)), key=lambda k: tried[rates[k]])
        low, high = rates[max(at - 1, 0)], rates[min(at + 1, len(rates) - 1)]
    before = loss(0.0)
    if not tried[rates[at]] < before:
        raise ValueError(
            f"learning_rate: none between {rates[0]:.0e} and {rates[-1]:.0e} lowers the loss of {before:.4g} along the "
            "estimate; raise num_directions, or check epsilon"
        )
    return rates[at]
