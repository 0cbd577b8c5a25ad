"""Images as sequences of grey levels, row by row, to generate or to classify.

A sequence begins with a token of its own, number `levels`, and holds side * side pixels: input_ids and labels are
(1 + side * side). Or, where the model takes numbers, of rows of pixels as they are.
"""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset


def digits(split: str = "train", levels: int = 8, seed: int = 0, classify: bool = False) -> "Dataset":
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, which come with it: a `datasets.Dataset`.

    Args:
        split: "train", or "test": every fifth of the images in an order drawn by `seed`.
        levels: grey levels, 2 to 17.
        classify: labels are the digits, 0 to 9, and not the pixels.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: another split or number of levels.
    """
    _check_levels(levels, 17)
    images, values = digit_images(split, seed)
    return _sequences(images, levels, values if classify else None)


def digit_rows(split: str = "train", seed: int = 0) -> "Dataset":
    """The same digits for models that take numbers, a row of pixels a step: a `datasets.Dataset`.

    `input_features` (8, 8), from 0 to 1, and `labels`, 0 to 9. Arguments and errors as of `digits`.
    """
    from datasets import Dataset

    images, values = digit_images(split, seed)
    return Dataset.from_dict({"input_features": images, "labels": values}).with_format("torch")


def digit_images(split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The split's images (N, 8, 8), float32 from 0 to 1, and the digits (N,) that they show."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits: needs scikit-learn, pip install 'hf-rnn[tasks]'") from error
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    chosen = order[::5] if split == "test" else np.delete(order, np.s_[::5])
    return (data.images[chosen] / 16).astype(np.float32), data.target[chosen]


def image_sequences(
    name: str, split: str = "train", side: int = 28, levels: int = 8, column: str = "image"
) -> "Dataset":
    """Any image data set, such as "ylecun/mnist" or a folder of images: a `datasets.Dataset` of grey sequences.

    Args:
        name: on the Hub, a folder that `datasets` saved, or a folder of image files.
        split: which of its splits.
        side: images are scaled to side x side pixels.
        levels: grey levels, 2 to 256.
        column: where the images are.

    Raises:
        ValueError: there is no such split or column; side or levels out of range.
    """
    from pathlib import Path

    import datasets

    if side < 1:
        raise ValueError(f"side: expected at least 1, got {side}")
    _check_levels(levels, 256)

    if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(name)
    elif Path(name).is_dir():
        data = datasets.load_dataset("imagefolder", data_dir=name)
    else:
        data = datasets.load_dataset(name)
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"split: {name} has {sorted(data)}, got {split!r}")
        data = data[split]
    if column not in data.column_names:
        raise ValueError(f"column: {name} has {data.column_names}, got {column!r}")
    images = [np.asarray(image.convert("L").resize((side, side))) / 255 for image in data[column]]
    return _sequences(np.stack(images), levels)


def _check_levels(levels: int, most: int) -> None:
    if not 2 <= levels <= most:
        raise ValueError(f"levels: expected 2 to {most}, got {levels}")


def _sequences(images: np.ndarray, levels: int, labels: np.ndarray | None = None) -> "Dataset":
    """(N, side, side) in [0, 1], with labels (N,) or the pixels themselves."""
    from datasets import Dataset

    pixels = np.minimum((images * levels).astype(np.int64), levels - 1).reshape(len(images), -1)
    rows = np.concatenate([np.full((len(images), 1), levels), pixels], 1)
    return Dataset.from_dict({"input_ids": rows, "labels": rows if labels is None else labels}).with_format("torch")


def to_image(input_ids: Tensor | np.ndarray, levels: int) -> np.ndarray:
    """A sequence with or without its first token, (..., 1 + side * side), to grey values in [0, 1], (..., side, side).

    Raises:
        ValueError: pixels of no square.
    """
    pixels = np.asarray(input_ids)
    side = int(pixels.shape[-1] ** 0.5)
    if side * side != pixels.shape[-1]:
        pixels, side = pixels[..., 1:], int((pixels.shape[-1] - 1) ** 0.5)
    if side * side != pixels.shape[-1]:
        raise ValueError(
            f"input_ids: expected the pixels of a square, with or without a first token, got {pixels.shape}"
        )
    return np.minimum(pixels, levels - 1).reshape(*pixels.shape[:-1], side, side) / (levels - 1)
