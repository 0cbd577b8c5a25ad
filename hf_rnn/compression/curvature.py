"""Steps by how much an error of each row matters to the loss."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_rnn.compression.search import coded_parameters, difference, restored, root_mean_square
from hf_rnn_kernels.coding import dequantize_rows, encode_rows, quantize_rows, suited

# Squared steps that a bit is worth where the squared error is step^2 / 12 and a bit halves the step: 2 ln 2 / 12.
_SLOPE = 2 * math.log(2) / 12
_LEAST = 1 / 32  # of a tensor's mean curvature, added to every weight's: what a text did not have may come in another
_COARSEST = 2  # exponent, above a tensor's root mean square
_SMALL = 2048  # weights; for fewer a table of their own costs more than a coarser step saves
_CLOSE = 0.9  # of the loss allowed: near enough


def weight_curvature(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], exclude: str = r"norm|bias"
) -> dict[str, Tensor]:
    """Mean squared gradients of a model's matrices: the diagonal of Fisher's information, nearly the loss's curvature.

    Args:
        model: in place are its gradients, which are None afterwards.
        batches: arguments of `model`, labels among them; one sequence each, since gradients of several average out.
        exclude: as of `compress`.

    Returns:
        float32 on the CPU, by parameter.
    """
    parameters = coded_parameters(model, exclude)
    found = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    trains = model.training
    model.eval()
    try:
        for batch in batches:
            with torch.enable_grad():
                model(**batch).loss.backward()
            for name, p in parameters.items():
                if p.grad is not None:
                    found[name] += p.grad.detach().float().square().cpu()
            model.zero_grad(set_to_none=True)
    finally:
        model.zero_grad(set_to_none=True)
        model.train(trains)
    if not any(float(c.sum()) > 0 for c in found.values()):
        raise ValueError("batches: expected some with a loss that has gradients")
    return found


def floored(parameters: Mapping[str, Tensor], curvature: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Curvature with a least value; of a tensor without any, the mean of all."""
    for name, p in parameters.items():
        if name not in curvature or curvature[name].shape != p.shape:
            raise ValueError(f"curvature: expected one for {name}, of shape {tuple(p.shape)}; see weight_curvature")
    total = sum(float(curvature[name].sum()) for name in parameters) / sum(p.numel() for p in parameters.values())
    return {name: curvature[name] + (float(curvature[name].mean()) * _LEAST or total) for name in parameters}


def row_steps(x: Tensor, c: Tensor, multiplier: float, coder: str) -> Tensor:
    """(rows,) int64 exponent of each row's step, where a bit is worth `multiplier` of c * error^2.

    The error of a row times its curvature is then the same everywhere, which is best. Where it asks for a coarser step
    than four root mean squares there is nothing left to choose.
    """
    rows = c.reshape(-1, c.shape[-1]).mean(1).double()
    spacing = 1 if coder == "trellis" else 0  # of which every second multiple of the step is used
    top = round(math.log2(max(root_mean_square(x), 2.0**-100))) + _COARSEST
    exponents = (0.5 * torch.log2(multiplier / (_SLOPE * rows))).round().long() - spacing
    exponents = exponents.clamp(max(top - 20, -120), top)
    for e in reversed(exponents.unique().tolist()[1:]):  # from the coarsest, into the next finer one
        if int((exponents == e).sum()) * c.shape[-1] < _SMALL:
            finer = exponents[exponents < e].max()
            exponents[exponents == e] = finer
    return exponents


Choice = dict[str, tuple[Tensor, Tensor]]  # of each parameter: exponents and symbols


def quantised(coded: Mapping[str, Tensor], importance: Mapping[str, Tensor], multiplier: float, coder: str) -> Choice:
    """All tensors where a bit is worth `multiplier`."""
    found = {}
    for name, x in coded.items():
        own = suited(coder, x)
        exponents = row_steps(x, importance[name], multiplier, own)
        found[name] = exponents, quantize_rows(x, exponents, multiplier, importance[name], own)
    return found


@torch.no_grad()
def choose_by_curvature(
    parameters: Mapping[str, Tensor],
    bases: Mapping[str, Tensor],
    evaluate: Callable[[], float],
    curvature: Mapping[str, Tensor],
    max_loss_increase: float,
    coder: str,
    evaluations: int = 10,
) -> Choice:
    """The exponents and symbols with the fewest bits at which the loss is within the bound.

    One multiplier, what a bit is worth, decides on all steps and roundings. Increases of the loss are about
    proportional to it: it is divided by how far the last one was off, between those that were too much and too little.
    A third of the evaluations go to equal importance of all weights, and the smaller result counts.

    Args:
        parameters, bases: what is coded, and what it is a difference to; unchanged afterwards.
        evaluate: the model's loss.
        curvature: of each parameter.
        max_loss_increase: as a share.
        coder: whose symbols.
        evaluations: of the loss at most, the first one included; at least 3.

    Raises:
        ValueError: a loss that is not above 0, or that no evaluation found within the bound.
    """
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    coded = {name: difference(p, bases.get(name)) for name, p in kept.items()}
    importance = floored(parameters, curvature)
    start = evaluate()
    if not 0 < start < math.inf:
        raise ValueError(f"evaluate: expected a finite loss above 0, got {start}")
    if not 0 < max_loss_increase < math.inf:
        raise ValueError(f"max_loss_increase: expected a share above 0, got {max_loss_increase}")
    if evaluations < 3:
        raise ValueError(f"evaluations: expected at least 3, got {evaluations}")

    def increase(found: Choice) -> float:
        try:
            for name, (exponents, q) in found.items():
                x = dequantize_rows(q, exponents, coded[name].dtype).to(coded[name].device)
                parameters[name].copy_(restored(x, bases.get(name), kept[name].dtype))
            loss = evaluate()
            return loss / start - 1 if math.isfinite(loss) else math.inf
        finally:
            for name, p in kept.items():
                parameters[name].copy_(p)

    def fewest(importance: Mapping[str, Tensor], evaluations: int) -> Choice | None:
        """The coarsest within the bound that so many evaluations find."""
        # An error of a tenth of each weight, to begin with
        energy = sum(float((importance[name] * x.cpu().float().square()).sum()) for name, x in coded.items())
        guess = math.log2(0.01 * energy / sum(x.numel() for x in coded.values()) + 2.0**-200)
        low, high, best = -math.inf, math.inf, None
        for _ in range(evaluations):
            found = quantised(coded, importance, 2.0**guess, coder)
            risen = increase(found)
            if risen <= max_loss_increase:
                best, low = found, guess
                if risen >= _CLOSE * max_loss_increase:
                    break
            else:
                high = guess
            # Noise of the loss may be more than the increase: at most eight times a step
            change = math.log2(0.95 * max_loss_increase / max(risen, 1e-9 * max_loss_increase))
            guess += max(-3.0, min(3.0, change))
            if not low < guess < high:
                guess = (low + high) / 2
            if high - low < 0.05:
                break
        return best

    def size(choice: Choice) -> int:
        return sum(
            encode_rows(q, exponents, coded[name].dtype, suited(coder, coded[name])).numel()
            for name, (exponents, q) in choice.items()
        )

    # Where training has made the gradients of a text nearly nothing they say little about errors: equal ones are tried.
    equal = {name: torch.ones_like(c) for name, c in importance.items()}
    found = [fewest(importance, evaluations - 1 - evaluations // 3), fewest(equal, evaluations // 3)]
    within = [choice for choice in found if choice is not None]
    if not within:
        raise ValueError(
            f"max_loss_increase: {evaluations} evaluations found no steps within {max_loss_increase:g}; allow more of "
            "either, or exclude the tensors that matter most"
        )
    return min(within, key=size)
