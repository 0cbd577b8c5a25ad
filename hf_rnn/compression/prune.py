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
        ratio: share of weights, in [0, 1].
        evaluate: a loss or an accuracy of the model as it is.
        exclude: regular expression of parameters to leave alone; those of one dimension always are.

    Returns:
        `zeros`, the share of zeros now, and with `evaluate` what it said `before` and `after`.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected a share in [0, 1], got {ratio}")
    parameters = coded_parameters(model, exclude)
    found = {} if evaluate is None else {"before": float(evaluate())}
    magnitudes = torch.cat([p.detach().abs().float().flatten() for p in parameters.values()])
    count = round(ratio * len(magnitudes))
    if count:
        threshold = magnitudes.kthvalue(count).values
        for p in parameters.values():
            p.detach().masked_fill_(p.detach().abs() <= threshold, 0)
    if evaluate is not None:
        found["after"] = float(evaluate())
    zeros = sum(int((p == 0).sum()) for p in parameters.values()) / len(magnitudes)
    return found | {"zeros": zeros}
