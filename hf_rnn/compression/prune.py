"""Pruning by magnitude."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from hf_rnn.compression.search import coded_parameters


def prune(
    model: PreTrainedModel, ratio: float, evaluate: Callable[[], float] | None = None, exclude: str = r"norm|bias"
) -> dict[str, float]:
    """Set the smallest weights of all matrices together to zero, in place.

    Args:
        model: any of transformers'.
        ratio: share of weights, in [0, 1]; of equal ones at the border as many as it takes, evenly over the matrices.
        evaluate: a loss or an accuracy of the model as it is.
        exclude: regular expression of parameters to leave alone; those of one dimension always are.

    Returns:
        `zeros`, the share of zeros now, and with `evaluate` what it said `before` and `after`.

    Raises:
        ValueError: a ratio outside [0, 1], a quantized model.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected a share in [0, 1], got {ratio}")
    if getattr(model, "is_quantized", False):
        raise ValueError("model: expected plain weights, these are quantized; dequantize() them first")
    parameters = coded_parameters(model, exclude)
    found = {} if evaluate is None else {"before": float(evaluate())}
    magnitudes = torch.cat([p.detach().abs().float().flatten() for p in parameters.values()])
    count = round(ratio * len(magnitudes))
    if count:
        pruned = _smallest(magnitudes, count)
        for p, part in zip(parameters.values(), pruned.split([p.numel() for p in parameters.values()]), strict=True):
            p.detach().masked_fill_(part.view(p.shape), 0)
    if evaluate is not None:
        found["after"] = float(evaluate())
    zeros = sum(int((p == 0).sum()) for p in parameters.values()) / len(magnitudes)
    return found | {"zeros": zeros}


def _smallest(x: torch.Tensor, count: int) -> torch.Tensor:
    """Which of x (N,) are its `count` smallest; of those equal to the largest of them so many as are missing, evenly
    over x, so that no layer is emptied for coming first."""
    threshold = x.kthvalue(count).values
    smaller, equal = x < threshold, x == threshold
    missing, ties = count - smaller.sum(), equal.sum()
    rank = equal.cumsum(0)
    return smaller | (equal & (rank * missing // ties > (rank - 1) * missing // ties))
