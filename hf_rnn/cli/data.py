"""Text for the command line: a local file, a saved dataset, or a dataset's name on the Hub."""

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
            raise ValueError(f"data: {data} is not UTF-8 text ({error})") from error
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


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """One stream of token ids, the documents separated by the end-of-text token where there are several.

    Returns:
        The ids (T,) int32, and (T,) int64 how many bytes of the texts, in UTF-8, have been read by the end of each
        token. What the tokenizer drops or replaces counts as well: it is part of the text.
    """
    separator = [tokenizer.eos_token_id] if len(documents) > 1 and tokenizer.eos_token_id is not None else []
    ids, ends, size = [], [], 0
    for text in documents:
        encoding = tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,
            return_offsets_mapping=tokenizer.is_fast,
        )
        read = byte_ends(text, len(encoding["input_ids"]), encoding.get("offset_mapping"))
        length = len(text.encode())
        ids.append(np.array(encoding["input_ids"] + separator, dtype=np.int32))
        ends.append(size + np.append(read, np.full(len(separator), length)))
        size += length
    read = np.concatenate(ends)
    read[-1:] = size
    return np.concatenate(ids), read


def byte_ends(text: str, count: int, offsets: list[tuple[int, int]] | None) -> np.ndarray:
    """How many bytes of `text` have been read by the end of each of its `count` tokens, (count,) int64.

    Tokens that end in the same character share its bytes evenly, which is exact for tokens that are bytes. So do all
    tokens of a text where the tokenizer, being one in Python, gives no `offsets` (start and end of each in characters).
    """
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    before = np.append(0, sizes.cumsum())  # bytes before each character
    number = np.arange(1, count + 1)
    if offsets is None:
        return -(-number * before[-1] // max(count, 1))
    last = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    first = np.searchsorted(last, last)  # of the tokens that end where this one does
    sharing = np.searchsorted(last, last, "right") - first
    start = before[np.maximum(last - 1, 0)]
    return start - (first - number) * (before[last] - start) // sharing


def cut_documents(stream: np.ndarray, separator: int | None):
    """A stream as a `datasets.Dataset` of documents, each with the separator at its end; None: one document."""
    from datasets import Dataset

    ends = np.zeros(0, int) if separator is None else np.flatnonzero(stream[:-1] == separator) + 1
    return Dataset.from_dict({"input_ids": np.split(stream, ends)})


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
