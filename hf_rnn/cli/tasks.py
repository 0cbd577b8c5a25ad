"""Tasks other than text that goes on: what `hf-rnn train --task` makes of a dataset, and of a model's answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from hf_rnn.cli.data import blocks, read_documents, tokenize

_IGNORED = -100
_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
MODELS: dict[str, Any] = {
    "masked-lm": AutoModelForMaskedLM,
    "token-classification": AutoModelForTokenClassification,
    "sequence-classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
}


class Prepared(NamedTuple):
    """A dataset as a task has it: rows to train on and to evaluate on (None: none), the collator that makes batches of
    them, settings of the model's config, and the metrics of a model's answers."""

    training: Dataset
    evaluation: Dataset | None
    collator: Callable
    config: dict[str, Any]
    metrics: Callable[[Any], dict[str, float]]


def prepare(task: str, data: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    """The dataset that the arguments `data` name, for one of `MODELS`' tasks.

    Raises:
        ValueError: columns that there are not, or hold something else than the task's labels; no token to mask with.
    """
    if task == "masked-lm":
        return _masked(data, tokenizer)
    rows = read_rows(data.data, data.split, (data.text_column, data.label_column))
    make = _words if task == "token-classification" else _regression if task == "regression" else _classes
    prepared = make(rows, data, tokenizer)
    held_out = int(len(rows) * data.held_out)
    if not held_out:
        return prepared
    parts = prepared.training.train_test_split(held_out, seed=seed)
    return prepared._replace(training=parts["train"], evaluation=parts["test"])


def read_rows(data: str, split: str, columns: tuple[str, ...]) -> Dataset:
    """Rows of a file (csv, json, jsonl, parquet), of a folder that `datasets` saved, or of a dataset on the Hub."""
    path = Path(data)
    if path.is_file():
        if path.suffix not in _FILES:
            raise ValueError(
                f"data: expected a file of rows, one of {sorted(_FILES)}, a folder or a dataset, got {data}"
            )
        dataset: Any = load_dataset(_FILES[path.suffix], data_files=data, split="train")
    elif not path.is_dir() and (path.suffix or path.is_absolute()):
        raise ValueError(f"data: there is no file {data}")
    else:
        dataset = load_from_disk(data) if path.is_dir() else load_dataset(data)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"split: {data} has {sorted(dataset)}, got {split!r}")
        dataset = dataset[split]
    for name, column in zip(("text_column", "label_column"), columns, strict=False):
        if column not in dataset.column_names:
            raise ValueError(f"{name}: {data} has {dataset.column_names}, got {column!r}")
    if not len(dataset):
        raise ValueError(f"data: {data} holds no rows")
    return dataset


def _masked(data: Any, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    if tokenizer.mask_token is None:
        raise ValueError("tokenizer: masked-lm needs a mask token, and this one has none")
    stream, _ = tokenize(read_documents(data.data, data.split, data.text_column), tokenizer)
    cut = len(stream) - int(len(stream) * data.held_out)
    size = data.block_size
    sets = [blocks(part, size).remove_columns("labels") for part in (stream[:cut], stream[cut:]) if len(part) >= size]
    if not sets:
        raise ValueError(f"data: {len(stream)} tokens do not fill one block; choose block_size <= {len(stream)}")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    return Prepared(sets[0], sets[1] if len(sets) > 1 else None, collator, {}, _accuracy)


def _words(rows: Dataset, data: Any, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Words and a label for each. The text is words with spaces between; a token has the label of that it ends in."""
    if not tokenizer.is_fast:
        raise ValueError("tokenizer: labels of words need one that gives offsets, as fast tokenizers do")
    words, tags = rows[data.text_column], rows[data.label_column]
    if not isinstance(words[0], list) or not isinstance(tags[0], list):
        raise ValueError(
            f"text_column, label_column: expected a list of words and one of labels in each row, got "
            f"{type(words[0]).__name__} and {type(tags[0]).__name__}"
        )
    feature = getattr(rows.features[data.label_column], "feature", None)
    names, numbers = _named([tag for row in tags for tag in row], feature)

    def encode(row: dict) -> dict:
        own = row[data.text_column]
        if len(own) != len(row[data.label_column]):
            raise ValueError(f"label_column: {len(row[data.label_column])} labels for the {len(own)} words {own[:5]}")
        encoded = tokenizer(" ".join(own), return_offsets_mapping=True, truncation=True, max_length=data.block_size)
        ends = np.cumsum([len(word) + 1 for word in own])
        starts = ends - [len(word) + 1 for word in own]
        labels = []
        for _, end in encoded.pop("offset_mapping"):
            word = int(np.searchsorted(ends, end, "left"))  # the space in front of it is a token of its own, or its
            inside = end > 0 and word < len(own) and end > starts[word]
            labels.append(numbers[row[data.label_column][word]] if inside else _IGNORED)
        return {**encoded, "labels": labels}

    encoded = rows.map(encode, remove_columns=rows.column_names)
    return Prepared(encoded, None, DataCollatorForTokenClassification(tokenizer), _labels(names), _accuracy)


def _classes(rows: Dataset, data: Any, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """A class for each text, or a list of those that it has."""
    labels = rows[data.label_column]
    several = isinstance(labels[0], list)
    feature = rows.features[data.label_column]
    feature = getattr(feature, "feature", None) if several else feature
    names, numbers = _named([x for row in labels for x in row] if several else labels, feature)
    if not several and len(names) < 2:
        raise ValueError(f"label_column: expected at least two classes, got {names} alone")
    config = _labels(names) | {"problem_type": f"{'multi' if several else 'single'}_label_classification"}

    def label(value: Any) -> Any:
        if not several:
            return numbers[value]
        return [float(name in {numbers[x] for x in value}) for name in range(len(names))]

    encoded = _encoded(rows, data, tokenizer, label)
    return Prepared(encoded, None, DataCollatorWithPadding(tokenizer), config, _shares if several else _accuracy)


def _regression(rows: Dataset, data: Any, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    if not all(isinstance(x, int | float) and np.isfinite(x) for x in rows[data.label_column]):
        raise ValueError(f"label_column: expected a finite number in each row of {data.label_column!r}")
    encoded = _encoded(rows, data, tokenizer, float)
    return Prepared(
        encoded, None, DataCollatorWithPadding(tokenizer), {"num_labels": 1, "problem_type": "regression"}, _errors
    )


def _encoded(rows: Dataset, data: Any, tokenizer: PreTrainedTokenizerBase, label: Callable) -> Dataset:
    if not all(isinstance(text, str) and text for text in rows[data.text_column]):
        raise ValueError(f"text_column: expected a text in each row of {data.text_column!r}")

    def encode(row: dict) -> dict:
        encoded = tokenizer(row[data.text_column], truncation=True, max_length=data.block_size)
        return {**encoded, "labels": label(row[data.label_column])}

    return rows.map(encode, remove_columns=rows.column_names)


def _named(values: list, feature: Any) -> tuple[list[str], dict[Any, int]]:
    """The classes' names, and the number of each value that stands for one: a `ClassLabel`'s, or in their order."""
    if None in values:
        raise ValueError("label_column: expected a label in each row, got None")
    if isinstance(feature, ClassLabel):
        return list(feature.names), {number: number for number in range(feature.num_classes)}
    kinds = sorted(set(values))
    return [str(kind) for kind in kinds], {kind: number for number, kind in enumerate(kinds)}


def _labels(names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def answers(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """What evaluation keeps of logits: numbers and scores of several labels themselves, else the largest's class."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits if labels.is_floating_point() else logits.argmax(-1)


def _accuracy(found: Any) -> dict[str, float]:
    there = found.label_ids != _IGNORED
    return {"accuracy": float((found.predictions == found.label_ids)[there].mean())}


def _shares(found: Any) -> dict[str, float]:
    """Of labels that a text has or has not, told right."""
    return {"accuracy": float(((found.predictions > 0) == (found.label_ids > 0.5)).mean())}


def _errors(found: Any) -> dict[str, float]:
    error = found.predictions.reshape(-1) - found.label_ids.reshape(-1)
    spread = found.label_ids.var()
    r2 = {"r2": float(1 - (error**2).mean() / spread)} if spread > 0 else {}
    return {"rmse": float((error**2).mean() ** 0.5)} | r2
