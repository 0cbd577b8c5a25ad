"""Handwritten numbers of several digits, of which nobody says where they stand: for connectionist classifiers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_rnn.tasks.pixels import digit_images
from hf_rnn.tasks.synthetic import random_of_row

SIDE, BLANK = 8, 10  # pixels of an image; after the digits


@dataclass(frozen=True)
class DigitStrings:
    """A map-style data set of scikit-learn's digits side by side, read column by column.

    0 to `max_gap` empty columns are in front of each digit and behind the last one. Row i is a function of (seed, i):
    `input_features` (T, 8), the pixels of a column, from 0 to 1, and `labels` (digits,), 0 to 9.

    Args:
        split: "train" or "test": which of the images, as of `digits`.
        size: number of rows; they cost nothing until they are asked for.
        seed: other rows for another seed, of the same images.
        digits: of a row.
        max_gap: columns.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: another split, or a number out of its range.
    """

    split: str = "train"
    size: int = 2**20
    seed: int = 0
    digits: int = 5
    max_gap: int = 4

    vocab_size = 11
    pad_token_id = BLANK
    num_input_features = SIDE

    def __post_init__(self):
        for name, least in dict(size=1, seed=0, digits=1, max_gap=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        digit_images(self.split)

    @cached_property
    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        return digit_images(self.split)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        random = random_of_row(index, self.size, self.seed)
        images, values = self._images
        chosen = random.integers(len(images), size=self.digits)
        gaps = [np.zeros((gap, SIDE), np.float32) for gap in random.integers(self.max_gap + 1, size=self.digits + 1)]
        columns = [part for gap, n in zip(gaps, chosen, strict=False) for part in (gap, images[n].T)]
        features = np.concatenate([*columns, gaps[-1]])
        return {"input_features": torch.from_numpy(features), "labels": torch.from_numpy(values[chosen])}


def pad_features(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of rows of several lengths, as a `data_collator`: `input_features` (B, T, F) and `attention_mask` (B, T),
    zeros behind the end of each; `labels` (B, L), -100 behind."""
    features, labels = ([row[name] for row in rows] for name in ("input_features", "labels"))
    return {
        "input_features": pad_sequence(features, batch_first=True),
        "attention_mask": pad_sequence([torch.ones(len(x), dtype=torch.long) for x in features], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
