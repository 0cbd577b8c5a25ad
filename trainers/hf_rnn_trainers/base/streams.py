"""A corpus as parallel streams of documents, whose batches go on where those before them ended."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset as ArrowDataset
from datasets import IterableDataset as ArrowStream
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

COLUMN = "input_ids"


class Streams(Dataset):
    """`rows` streams of equal length, one after another of the corpus, read `length` tokens at a time.

    Item s * rows + r is the s-th window of stream r, so that batches of `rows` items in their order go on where the
    ones before ended. The last windows are padded; nothing is left out.

    Args:
        documents: a `datasets.Dataset` with a column of token ids, `input_ids`, each row a document. It is not copied.
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
        self._chunks, lengths = _token_chunks(documents)
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])
        self._starts = np.append(0, np.cumsum(lengths))  # of documents, and the corpus's end
        self.rows, self.length, self.reset = rows, length, reset_at_documents
        total = int(self._starts[-1])
        self.row_length = -(-total // rows)
        if total < 2 * rows or total <= (rows - 1) * self.row_length:
            raise ValueError(f"stream: {total} tokens are too few for {rows} rows of at least 2; lower the batch size")
        self.windows = -(-self.row_length // length)
        self._shortest = total - (rows - 1) * self.row_length  # the last row

    def __len__(self) -> int:
        return self.windows * self.rows

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        window, row = divmod(item, self.rows)
        total = int(self._starts[-1])
        first, last = row * self.row_length, min((row + 1) * self.row_length, total)
        start = min(first + window * self.length, last)
        end = min(start + self.length, last)
        place = np.arange(start, end)
        document = np.searchsorted(self._starts, place, side="right") - 1
        positions = place - np.maximum(self._starts[document], first)
        ids = self._read(start, min(end + 1, total))  # the last token of a stream predicts the first of the next
        after = np.arange(start + 1, start + len(ids))
        starts = self._starts[np.searchsorted(self._starts, after)] == after
        padded = (window + 1) * self.length > self._shortest
        return as_window(ids, positions, starts, self.length, self.reset, padded)

    def _read(self, start: int, end: int) -> np.ndarray:
        """Tokens `start` to `end` of the corpus."""
        parts, at = [], start
        while at < end:
            chunk = int(np.searchsorted(self._ends, at, side="right"))
            before = int(self._ends[chunk]) - len(self._chunks[chunk])
            parts.append(self._chunks[chunk][at - before : end - before])
            at += len(parts[-1])
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


class OpenStreams(IterableDataset):
    """The same of documents that come one after another: a row that has read its document takes the next one there is.

    Ends when the documents do: rows are then padded to the longest of them. Its items come in the order of `Streams`;
    a run that goes on reads again what it had read, to be where it was.

    Args:
        documents: a `datasets.IterableDataset`, or anything that gives a dict with `input_ids` for each document.
        others: see `Streams`.
    """

    def __init__(self, documents: Iterable, rows: int, length: int, reset_at_documents: bool = True):
        self.documents, self.rows, self.length, self.reset = documents, rows, length, reset_at_documents

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.documents, ArrowStream):
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
        self.ids, self.positions = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def fill(self, count: int) -> int:
        """Read on until there are `count` tokens, or no documents; how many there are."""
        parts, positions, size = [self.ids], [self.positions], len(self.ids)
        while size < count and (document := next(self.documents, None)) is not None:
            parts.append(np.asarray(document[COLUMN], dtype=np.int64))
            positions.append(np.arange(len(parts[-1])))
            size += len(parts[-1])
        self.ids, self.positions = np.concatenate(parts), np.concatenate(positions)
        return size

    def take(self, length: int, reset: bool, padded: bool) -> dict[str, Tensor]:
        ids, positions = self.ids[: length + 1], self.positions[: length + 1]
        self.ids, self.positions = self.ids[length:], self.positions[length:]
        return as_window(ids, positions[:length], positions[1:] == 0, length, reset, padded)


def as_window(
    ids: np.ndarray, positions: np.ndarray, starts: np.ndarray, length: int, reset: bool, padded: bool
) -> dict[str, Tensor]:
    """An item, of ids with the token after the window, where there is one; whether each but the first starts a
    document."""
    real = len(positions)
    targets = np.full(length, -100)
    targets[: max(len(ids) - 1, 0)] = np.where(starts & reset, -100, ids[1:])
    window = {COLUMN: _padded(ids[:real], length), "labels": targets, "shift_labels": targets}
    if reset:
        window["position_ids"] = _padded(positions, length)
    if padded:
        window["attention_mask"] = (np.arange(length) < real).astype(np.int64)
    return {name: torch.from_numpy(x) for name, x in window.items()}


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, (0, length - len(x)))


def _token_chunks(documents: ArrowDataset) -> tuple[list[np.ndarray], np.ndarray]:
    """The tokens as arrays that lie one after another, as they are in files, and each document's length."""
    if documents._indices is not None:
        documents = documents.flatten_indices()
    lists = documents.data.column(COLUMN).chunks
    if any(chunk.null_count for chunk in lists):
        raise ValueError(f"stream: expected token ids in each row of {COLUMN}, some have none")
    tokens = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in lists]
    lengths = [pyarrow.compute.list_value_length(chunk).to_numpy() for chunk in lists]
    return [t for t in tokens if len(t)], np.concatenate([np.zeros(0, np.int64), *lengths])


def as_streams(documents: Any, rows: int, length: int, reset_at_documents: bool) -> Streams | OpenStreams:
    """The layout that a corpus's kind has."""
    kind = OpenStreams if isinstance(documents, ArrowStream | IterableDataset) else Streams
    return kind(documents, rows, length, reset_at_documents)
