"""Tasks that say what a memory can do: synthetic ones without end, images as sequences of pixels, handwritten numbers,
sources of Python, tagged, and series to be forecast."""

from hf_rnn.tasks.digit_strings import DigitStrings, pad_features
from hf_rnn.tasks.listops import ListOps
from hf_rnn.tasks.metrics import accuracy, best_path, compute_metrics, error_rate, preprocess_logits_for_metrics
from hf_rnn.tasks.pixels import digit_rows, digits, image_sequences, to_image
from hf_rnn.tasks.series import SyntheticSeries
from hf_rnn.tasks.sources import byte_labels, python_documentation, python_sources, python_texts
from hf_rnn.tasks.synthetic import (
    KeysValues,
    LinearRule,
    ModularArithmetic,
    Parity,
    Retrieval,
    SelectiveCopying,
    Stack,
    StringCopy,
    SyntheticTask,
)

__all__ = [
    "DigitStrings",
    "KeysValues",
    "LinearRule",
    "ListOps",
    "ModularArithmetic",
    "Parity",
    "Retrieval",
    "SelectiveCopying",
    "Stack",
    "StringCopy",
    "SyntheticSeries",
    "SyntheticTask",
    "accuracy",
    "best_path",
    "byte_labels",
    "compute_metrics",
    "digit_rows",
    "digits",
    "error_rate",
    "image_sequences",
    "pad_features",
    "preprocess_logits_for_metrics",
    "python_documentation",
    "python_sources",
    "python_texts",
    "to_image",
]
