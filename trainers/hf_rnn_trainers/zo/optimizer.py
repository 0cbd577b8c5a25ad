"""SGD on an estimate that is never written out."""

import torch
from torch import Tensor

from hf_rnn_trainers.zo.directions import Directions


class ZOSGD(torch.optim.Optimizer):
    """w <- (1 - lr * weight_decay) w - lr * sum_j c_j delta_j, for low-rank directions one matrix product into w.

    Attributes:
        directions, at, coefficients: the delta_j, the step they are of, and c; given before each `step`, which without
            them changes nothing.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.directions: Directions | None = None
        self.at = 0
        self.coefficients: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if self.directions is None or self.coefficients is None:
            return
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for p, parts in self.directions.combine(self.at, self.coefficients):
            group = groups[id(p)]
            update(p, parts, 1 - group["lr"] * group["weight_decay"], -group["lr"])
        self.coefficients = None


def update(p: Tensor, parts: tuple[Tensor, ...], keep: float, amount: float) -> None:
    """p <- keep * p + amount * (product of parts), in place; in float32 where p has fewer bits."""
    if len(parts) == 2 and parts[0].dtype == p.dtype and p.dim() == 2:
        p.addmm_(*parts, beta=keep, alpha=amount)
    elif len(parts) == 2 and parts[0].dtype == p.dtype and p.dim() == 3:
        p.baddbmm_(*parts, beta=keep, alpha=amount)
    else:
        p.copy_(p.to(parts[0].dtype) * keep + written_out(parts) * amount)


def written_out(parts: tuple[Tensor, ...]) -> Tensor:
    """The estimate of one parameter, as it comes from `Directions.combine`."""
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]
