"""Checks of labels, before a loss broadcasts them."""

from typing import Any

import torch
from torch import Tensor

from hf_rnn.skeleton.inputs import check_ids
from hf_rnn_kernels.checks import values_known


def count_labels(config: Any) -> int:
    """How many classes a head has: `config.num_labels`, at least one."""
    if not config.num_labels:
        raise ValueError("num_labels: expected at least 1 for a head that labels, got 0")
    return config.num_labels


def check_token_labels(labels: Tensor, logits: Tensor, setting: str) -> None:
    """Raise unless labels are one of the C classes, or -100, for each token of the logits (B, T, C).

    Args:
        setting: the config's that says how many classes there are.
    """
    check_ids("labels", labels, logits.shape[2], ignore_index=-100, setting=setting)
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels: expected one for each token, shape (B, T) = {tuple(logits.shape[:2])}, got {tuple(labels.shape)}"
        )


def check_sequence_labels(labels: Tensor, logits: Tensor, config: Any) -> None:
    """Raise unless labels are what `config.problem_type` takes for logits (B, C); None: as transformers guesses it."""
    batch, classes = logits.shape
    whole = not labels.is_floating_point()
    guess = "regression" if classes == 1 else "single_label_classification" if whole else "multi_label_classification"
    kind = config.problem_type or guess
    shapes: list[tuple[int, ...]] = [(batch, classes)]
    if kind == "single_label_classification":
        check_ids("labels", labels, classes, ignore_index=-100, setting="num_labels")
        shapes = [(batch,), (batch, 1)]
    elif whole:
        raise TypeError(f"labels: expected floating numbers, config.problem_type is {kind!r}; got {labels.dtype}")
    elif kind == "regression" and classes == 1:
        shapes = [(batch,), (batch, 1)]
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"labels: expected shape {shapes[0]}, config.problem_type is {kind!r}; got {tuple(labels.shape)}"
        )
    if labels.is_floating_point():
        _check_numbers(labels, kind)


def _check_numbers(labels: Tensor, kind: str) -> None:
    """Raise ValueError for labels that are no numbers, or no shares; on a CPU, as ids are checked."""
    right = labels.isfinite() if kind == "regression" else (labels >= 0) & (labels <= 1)
    if labels.device.type == "cpu" and values_known(right) and not bool(right.all()):
        expected = "finite numbers" if kind == "regression" else "zeros and ones, or numbers between"
        raise ValueError(
            f"labels: expected {expected}, config.problem_type is {kind!r}; got {labels[~right][0].item():g}"
        )


def check_not_empty(name: str, logits: Tensor) -> None:
    """Raise ValueError for logits (B, T, ...) of no tokens, to which labels were given."""
    if not logits.shape[0] or not logits.shape[1]:
        raise ValueError(
            f"{name}: expected none for a batch of no tokens, (B, T) = {tuple(logits.shape[:2])}, which has no loss"
        )


def check_positions(name: str, positions: Tensor, batch: int) -> None:
    """Raise unless positions are (B,) or (B, 1) integers; those outside the text are ignored, as by transformers."""
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected integers (int64 or int32), got {positions.dtype}")
    if tuple(positions.shape) not in [(batch,), (batch, 1)]:
        raise ValueError(f"{name}: expected shape (B,) = ({batch},), got {tuple(positions.shape)}")
