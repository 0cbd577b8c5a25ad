"""A corpus as parallel streams of documents, whose batches go on where those before them ended."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset as ArrowDataset
from datasets import IterableDataset as ArrowStream
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

COLUMN, LABELS, MASK = "input_ids", "labels", "attention_mask"
_PADDED = "attention_mask: expected documents without padding, which a stream has no use for; tokenize without it"


class Streams(Dataset):
    """`rows` streams of equal length, one after another of the corpus, read `length` tokens at a time.

    Item s * rows + r is the s-th window of stream r, so that batches of `rows` items in their order go on where the
    ones before ended. The last windows are padded; nothing is left out.

    Args:
        documents: a `datasets.Dataset` with a column of token ids, `input_ids`, each row a document, and where targets
            are others than these one of `labels`, as models take them: -100 for what is none. It is not copied.
        rows: streams, over all processes.
        length: tokens of a window, T.
        reset_at_documents: each document starts from the initial state, and its first token is no target.

    Each item has `input_ids`, `labels` and `shift_labels` (T,), both the targets, the token after each or -100;
    `position_ids` where documents reset, the distance from the document's start or the stream's; and, of the last
    windows, `attention_mask`.

    Raises:
        TypeError, ValueError: other documents, or fewer than two tokens for each row.
    """

    def __init__(self, documents: ArrowDataset, rows: int, length: int, reset_at_documents: bool = True):
        if not isinstance(documents, ArrowDataset):
            raise TypeError(
                f"stream: expected a datasets.Dataset or IterableDataset of documents, got a {type(documents).__name__}"
            )
        if COLUMN not in documents.column_names:
            raise ValueError(f"stream: expected a column {COLUMN} of token ids, got {documents.column_names}")
        if documents.format["type"] == "custom":
            raise ValueError("stream: a transform of its rows would be passed by; map it over the data set instead")
        if documents._indices is not None:
            documents = documents.flatten_indices()
        if MASK in documents.column_names and not all(c.all() for c in _Column(documents, MASK).chunks):
            raise ValueError(_PADDED)
        self._ids = self._labels = _Column(documents, COLUMN)
        if LABELS in documents.column_names:
            self._labels = _Column(documents, LABELS)
            if not np.array_equal(self._labels.lengths, self._ids.lengths):
                raise ValueError(f"stream: expected as many {LABELS} as {COLUMN} in each document")
        self._starts = np.append(0, np.cumsum(self._ids.lengths))  # of documents, and the corpus's end
        self.rows, self.length, self.reset = rows, length, reset_at_documents
        total = int(self._starts[-1])
        if total < 2 * rows:
            raise ValueError(f"stream: {total} tokens are too few for {rows} rows of at least 2; lower the batch size")
        self._bounds = [total * row // rows for row in range(rows + 1)]  # of rows, whose lengths differ by one at most
        self.windows = math.ceil(math.ceil(total / rows) / length)
        self._shortest = total // rows

    def __len__(self) -> int:
        return self.windows * self.rows

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        window, row = divmod(item, self.rows)
        first, last, total = *self._bounds[row : row + 2], self._bounds[-1]
        start = min(first + window * self.length, last)
        end = min(start + self.length, last)
        place = np.arange(start, end)
        document = np.searchsorted(self._starts, place, side="right") - 1
        positions = place - np.maximum(self._starts[document], first)
        # The last token of a stream predicts the first of the next
        targets = self._labels.read(start + 1, min(end + 1, total))
        after = np.arange(start + 1, start + 1 + len(targets))
        starts = self._starts[np.searchsorted(self._starts, after)] == after
        padded = (window + 1) * self.length > self._shortest
        return as_window(self._ids.read(start, end), targets, positions, starts, self.length, self.reset, padded)


class OpenStreams(IterableDataset):
    """The same of documents that come one after another: a row that has read its document takes the next one there is.

    Ends when the documents do: rows are then padded to the longest of them. Its items come in the order of `Streams`;
    a run that goes on reads again what it had read, to be where it was.

    Args:
        documents: a `datasets.IterableDataset`, or anything that gives a dict with `input_ids`, and maybe `labels`, for
            each document.
        others: see `Streams`.
    """

    def __init__(self, documents: Iterable, rows: int, length: int, reset_at_documents: bool = True):
        self.documents, self.rows, self.length, self.reset = documents, rows, length, reset_at_documents

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.documents, "set_epoch"):
            self.documents.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        if info is not None and info.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers: documents that come one after another have one reader, got {info.num_workers}"
            )
        rest = iter(self.documents)
        rows = [_Row(rest) for _ in range(self.rows)]
        if any(row.fill(2) < 2 for row in rows):
            raise ValueError(f"stream: the documents end before {self.rows} rows have two tokens; lower the batch size")
        while True:
            if not any([row.fill(self.length + 1) for row in rows]):  # noqa: C419 - all of them
                return
            padded = any(len(row.ids) < self.length for row in rows)
            for row in rows:
                yield row.take(self.length, self.reset, padded)


class _Row:
    """What one row has read and not yet given."""

    def __init__(self, documents: Iterator):
        self.documents = documents
        self.ids = self.labels = self.positions = np.zeros(0, np.int64)

    def fill(self, count: int) -> int:
        """Read on until there are `count` tokens, or no documents; how many there are."""
        parts, size = [(self.ids, self.labels, self.positions)], len(self.ids)
        while size < count and (document := next(self.documents, None)) is not None:
            ids, labels = (np.asarray(document[n], dtype=np.int64) for n in (COLUMN, _labels_of(document)))
            if (mask := document.get(MASK)) is not None and not all(mask):
                raise ValueError(_PADDED)
            if len(labels) != len(ids):
                raise ValueError(f"stream: expected as many {LABELS} as {COLUMN} in each document")
            parts.append((ids, labels, np.arange(len(ids))))
            size += len(ids)
        self.ids, self.labels, self.positions = map(np.concatenate, zip(*parts, strict=True))
        return size

    def take(self, length: int, reset: bool, padded: bool) -> dict[str, Tensor]:
        ids, targets, positions = self.ids[:length], self.labels[1 : length + 1], self.positions[: length + 1]
        self.ids, self.labels, self.positions = self.ids[length:], self.labels[length:], self.positions[length:]
        return as_window(ids, targets, positions[:length], positions[1:] == 0, length, reset, padded)


def _labels_of(document: dict) -> str:
    return LABELS if document.get(LABELS) is not None else COLUMN


def as_window(
    ids: np.ndarray,
    targets: np.ndarray,
    positions: np.ndarray,
    starts: np.ndarray,
    length: int,
    reset: bool,
    padded: bool,
) -> dict[str, Tensor]:
    """An item, of a window's ids, the target after each where there is one, and whether that starts a document."""
    targets = np.where(starts & reset, -100, targets)
    window = {COLUMN: _padded(ids, length)}
    window[LABELS] = window["shift_labels"] = _padded(targets, length, -100)
    if reset:
        window["position_ids"] = _padded(positions, length)
    if padded:
        window["attention_mask"] = (np.arange(length) < len(ids)).astype(np.int64)
    return {name: torch.from_numpy(x) for name, x in window.items()}


def _padded(x: np.ndarray, length: int, value: int = 0) -> np.ndarray:
    return np.pad(x, (0, length - len(x)), constant_values=value)


class _Column:
    """A column of lists, one after another, as they lie in files."""

    def __init__(self, documents: ArrowDataset, name: str):
        kind = documents.data.column(name).type
        inner = getattr(kind, "value_type", None)
        if inner is None or not (
            pyarrow.types.is_integer(inner) or pyarrow.types.is_null(inner)
        ):  # null: all are empty
            raise ValueError(f"stream: expected lists of token ids in {name}, got {kind}")
        lists = documents.data.column(name).chunks
        flat = [chunk.flatten() for chunk in lists]
        if any(chunk.null_count for chunk in [*lists, *flat]):
            raise ValueError(f"stream: expected token ids in each row of {name}, some have none")
        chunks = [chunk.to_numpy(zero_copy_only=False) for chunk in flat]
        self.chunks = [chunk for chunk in chunks if len(chunk)]
        self.ends = np.cumsum([len(chunk) for chunk in self.chunks])
        lengths = [pyarrow.compute.list_value_length(chunk).to_numpy() for chunk in lists]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths])

    def read(self, start: int, end: int) -> np.ndarray:
        """Numbers `start` to `end` of all."""
        parts, at = [], start
        while at < end:
            chunk = int(np.searchsorted(self.ends, at, side="right"))
            before = int(self.ends[chunk]) - len(self.chunks[chunk])
            parts.append(self.chunks[chunk][at - before : end - before])
            at += len(parts[-1])
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def as_streams(documents: Any, rows: int, length: int, reset_at_documents: bool) -> Streams | OpenStreams:
    """The layout that a corpus's kind has."""
    kind = OpenStreams if isinstance(documents, ArrowStream | IterableDataset) else Streams
    return kind(documents, rows, length, reset_at_documents)
