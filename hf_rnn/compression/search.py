"""How coarse each tensor may be."""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_rnn_kernels.coding import dequantize, entropy, quantize

_FINEST, _LEVELS = 5, 6  # the search's steps: 2^-5 of a tensor's root mean square, and five coarser ones
_BISECTIONS = 12


def coded_parameters(model: PreTrainedModel, exclude: str) -> dict[str, Tensor]:
    """The matrices of a model, tied ones once, by name.

    Raises:
        ValueError: there are none.
    """
    try:
        pattern = re.compile(exclude)
    except re.error as error:
        raise ValueError(f"exclude: {exclude!r} is no regular expression ({error})") from error
    found: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.dim() > 1 and not (exclude and pattern.search(name))
    }
    if not found:
        raise ValueError(f"exclude: {exclude!r} leaves no matrix to code")
    return found


def choose_exponents(
    parameters: Mapping[str, Tensor],
    step: float | Mapping[str, int] | None = None,
    max_error: float | None = None,
    evaluate: Callable[[], float] | None = None,
    max_loss_increase: float = 0.005,
    rate: float = 0.1,
    bases: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """The exponent of each tensor's step; `compress` says what the arguments mean. Where `bases` has a tensor of a
    parameter's name, the difference to it is what is quantised."""
    if isinstance(step, Mapping):
        missing = sorted(set(parameters) - set(step))
        if missing:
            raise ValueError(f"step: expected an exponent for each tensor, none for {missing[:3]}")
        if not all(isinstance(step[name], int) for name in parameters):
            raise ValueError("step: expected whole exponents, such as -5 for 2^-5, of each tensor")
        return {name: step[name] for name in parameters}
    if step is not None:
        exponent = math.log2(step) if 0 < step < math.inf else 0.5
        if exponent != round(exponent):
            raise ValueError(f"step: expected a power of two, such as 0.03125, got {step}")
        return dict.fromkeys(parameters, round(exponent))
    if evaluate is not None:
        return _search(parameters, bases or {}, evaluate, max_loss_increase, rate)
    bound = 0.05 if max_error is None else max_error
    if not 0 < bound < 1:
        raise ValueError(f"max_error: expected a share in (0, 1), got {bound}")
    return {name: _coarsest(difference(p, (bases or {}).get(name)), bound, rate) for name, p in parameters.items()}


def difference(p: Tensor, base: Tensor | None) -> Tensor:
    """What is coded of a parameter: itself, or p - base, in float32 at least."""
    if base is None:
        return p.detach()
    wide = torch.promote_types(p.dtype, torch.float32)
    return p.detach().to(wide) - base.to(p.device, wide)


def restored(x: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A parameter again from what was coded of it, x: base + x, rounded once."""
    if base is None:
        return x.to(dtype)
    return (base.to(x.device, torch.promote_types(dtype, torch.float32)) + x).to(dtype)


def root_mean_square(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def _start(p: Tensor) -> int:
    """The exponent next to a tensor's root mean square."""
    return max(-100, round(math.log2(max(root_mean_square(p), 2.0**-100))))


def _coarsest(p: Tensor, bound: float, rate: float) -> int:
    size, exponent = root_mean_square(p), _start(p) + 2
    if size * 2.0**-20 > bound * size:
        raise ValueError(f"max_error: expected at least 1e-6, got {bound}")
    while exponent > -126 and size > 0:
        error = root_mean_square(dequantize(quantize(p, exponent, rate), exponent) - p.detach().float())
        if error <= bound * size:
            break
        exponent -= 1
    return exponent


@torch.no_grad()
def _search(
    parameters: Mapping[str, Tensor],
    bases: Mapping[str, Tensor],
    evaluate: Callable[[], float],
    max_loss_increase: float,
    rate: float,
) -> dict[str, int]:
    """Each tensor alone is quantised with each step, and the loss measured. As if the increases added up, the steps
    with the smallest sum of loss + multiplier * bits are taken; the multiplier, the largest for which the loss of all
    together stays within the bound, is found by bisection."""
    if not 0 < max_loss_increase < float("inf"):
        raise ValueError(f"max_loss_increase: expected a share above 0, got {max_loss_increase}")
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    coded = {name: difference(p, bases.get(name)) for name, p in kept.items()}
    start = evaluate()
    if not 0 < start < math.inf:
        raise ValueError(f"evaluate: expected a finite loss above 0, got {start}")
    bound = start * (1 + max_loss_increase)

    def loss(exponents: Mapping[str, int]) -> float:
        """With these tensors quantised and all others as they were."""
        try:
            for name, exponent in exponents.items():
                x = dequantize(quantize(coded[name], exponent, rate), exponent, coded[name].dtype)
                parameters[name].copy_(restored(x, bases.get(name), kept[name].dtype))
            found = evaluate()
            return found if math.isfinite(found) else math.inf
        finally:
            for name in exponents:
                parameters[name].copy_(kept[name])

    choices: dict[str, list[tuple[int, float, float]]] = {}  # exponent, loss, bits
    for name, x in tqdm(coded.items(), desc="how coarse each tensor may be", leave=False):
        first = _start(x) - _FINEST
        choices[name] = []
        for exponent in range(first, first + _LEVELS):
            q = quantize(x, exponent, rate)
            choices[name].append((exponent, max(loss({name: exponent}) - start, 0.0), entropy(q) * q.numel()))

    def chosen(multiplier: float) -> dict[str, int]:
        return {name: min(c, key=lambda item: item[1] + multiplier * item[2])[0] for name, c in choices.items()}

    best = {name: c[0][0] for name, c in choices.items()}
    if loss(best) > bound:
        raise ValueError(
            f"max_loss_increase: for {max_loss_increase:g} the finest steps tried, 2^-{_FINEST} of a tensor's root "
            "mean square, are too coarse; allow more, or exclude the tensors that matter most"
        )
    low, high = -40.0, 0.0  # exponents of the multiplier
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        exponents = chosen(2.0**middle)
        if loss(exponents) <= bound:
            best, low = exponents, middle
        else:
            high = middle
    return best
