"""Tasks that say what a memory can do: synthetic ones without end, and images as sequences of pixels."""

from hf_rnn.tasks.listops import ListOps
from hf_rnn.tasks.metrics import accuracy, compute_metrics, preprocess_logits_for_metrics
from hf_rnn.tasks.pixels import digits, image_sequences, to_image
from hf_rnn.tasks.synthetic import (
    KeysValues,
    ModularArithmetic,
    Parity,
    Retrieval,
    SelectiveCopying,
    Stack,
    StringCopy,
    SyntheticTask,
)

__all__ = [
    "KeysValues",
    "ListOps",
    "ModularArithmetic",
    "Parity",
    "Retrieval",
    "SelectiveCopying",
    "Stack",
    "StringCopy",
    "SyntheticTask",
    "accuracy",
    "compute_metrics",
    "digits",
    "image_sequences",
    "preprocess_logits_for_metrics",
    "to_image",
]
