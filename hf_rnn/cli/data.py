"""Text for the command line: a local file, a saved dataset, or a dataset's name on the Hub."""

from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase


def read_documents(data: str, split: str = "train", text_column: str = "text") -> list[str]:
    """The texts of `data`.

    Args:
        data: a text file (one document), a folder that `datasets` saved, or a dataset on the Hub.
        split: which split of a dataset.
        text_column: its column of texts.

    Raises:
        ValueError: there is no such split or column, or no text at all; the message names what there is.
    """
    path = Path(data)
    if path.is_file():
        try:
            documents = [path.read_bytes().decode("utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {data} is no UTF-8 text ({error})") from error
    else:
        import datasets

        if not path.is_dir() and (path.suffix or path.is_absolute()):
            raise ValueError(f"data: there is no file {data}")
        dataset = datasets.load_from_disk(data) if path.is_dir() else datasets.load_dataset(data)
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise ValueError(f"split: {data} has {sorted(dataset)}, got {split!r}")
            dataset = dataset[split]
        if text_column not in dataset.column_names:
            raise ValueError(f"text_column: {data} has {dataset.column_names}, got {text_column!r}")
        documents = list(dataset[text_column])
    if not any(documents):
        raise ValueError(f"data: {data} holds no text")
    return documents


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """One stream of token ids, the documents separated by the end-of-text token where there are several."""
    ids = [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for text in documents
    ]
    if len(ids) > 1 and tokenizer.eos_token_id is not None:
        ids = [[*tokens, tokenizer.eos_token_id] for tokens in ids]
    return np.fromiter(chain.from_iterable(ids), dtype=np.int32)


def blocks(stream: np.ndarray, block_size: int):
    """Cut a stream into a `datasets.Dataset` of `block_size` tokens a row; what is left over at the end is dropped.

    Raises:
        ValueError: the stream is shorter than one block.
    """
    from datasets import Dataset

    count = len(stream) // block_size
    if count == 0:
        raise ValueError(f"data: {len(stream)} tokens do not fill one block; choose block_size <= {len(stream)}")
    rows = stream[: count * block_size].reshape(count, block_size).astype(np.int64)
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")
