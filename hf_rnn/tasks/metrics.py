"""How right predictions are, with labels shifted as causal language models have them, -100 where there is none."""

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
