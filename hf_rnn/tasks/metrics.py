"""How right predictions are: labels shifted as causal language models have them, and transcriptions."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction


def accuracy(predictions: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> dict[str, float]:
    """Share of labels that are right, and of rows all of whose labels are.

    Args:
        predictions: logits (N, T, V) or token ids (N, T); position t predicts labels[:, t + 1].
        labels: (N, T), -100 where there is nothing to predict.

    Returns:
        `accuracy` and `exact_match`.
    """
    if predictions.ndim == 3:
        predictions = predictions.argmax(-1)
    predictions, labels = _to_numpy(predictions), _to_numpy(labels)
    if predictions.shape != labels.shape or labels.ndim != 2:
        raise ValueError(
            f"predictions, labels: expected (N, T, V) or (N, T) and (N, T), got {predictions.shape} and {labels.shape}"
        )
    labels = labels[:, 1:]
    labelled = labels != -100
    right = (predictions[:, :-1] == labels) | ~labelled
    count = int(labelled.sum())
    if count == 0:
        raise ValueError("labels: expected some that are not -100")
    some = labelled.any(1)
    return {"accuracy": float(right[labelled].mean()), "exact_match": float(right.all(1)[some].mean())}


def best_path(logits: Tensor, blank: int, attention_mask: Tensor | None = None) -> list[list[int]]:
    """What a CTC model reads, greedily: the likeliest label of each step, repeated ones once, blanks dropped.

    Args:
        logits: (B, T, C).
        blank: the model's `config.pad_token_id`.
        attention_mask: (B, T), zeros at steps of padding; None: there are none.
    """
    steps = logits.argmax(-1)
    real = torch.ones_like(steps, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    rows = [row[there].tolist() for row, there in zip(steps, real, strict=True)]
    return [[label for label, _ in groupby(row) if label != blank] for row in rows]


def error_rate(found: Sequence[Sequence], expected: Sequence[Sequence]) -> float:
    """Edits that make the found sequences the expected ones, over the length of these: of characters or labels CER, of
    words WER.

    Raises:
        ValueError: not as many found as expected, or nothing is.
    """
    if len(found) != len(expected) or not any(map(len, expected)):
        raise ValueError(f"found, expected: as many sequences, not all empty; got {len(found)} and {len(expected)}")
    return sum(map(_edits, found, expected)) / sum(map(len, expected))


def _edits(x: Sequence, y: Sequence) -> int:
    """Insertions, deletions and replacements: Levenshtein's distance."""
    row = list(range(len(y) + 1))
    for i, a in enumerate(x, 1):
        above, row = row, [i]
        for j, b in enumerate(y, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def _to_numpy(x: Tensor | np.ndarray) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy` for transformers' Trainer, of logits or of what `preprocess_logits_for_metrics` keeps."""
    predictions, labels = prediction.predictions, prediction.label_ids
    if isinstance(predictions, tuple):  # a model's further outputs
        predictions = predictions[0]
    return accuracy(predictions, np.asarray(labels))


def preprocess_logits_for_metrics(logits: Tensor, labels: Tensor) -> Tensor:
    """Predicted ids instead of logits, so that an evaluation keeps (N, T) numbers."""
    return logits[0].argmax(-1) if isinstance(logits, tuple) else torch.argmax(logits, -1)
