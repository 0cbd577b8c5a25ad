"""Sources of Python's standard library, what each byte is part of: a tagging task that every machine has."""

import hashlib
import io
import keyword
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT = 0.05  # of the documentation
LABELS = ("whitespace", "name", "keyword", "string", "number", "comment", "operator")
_NAMES = {"NAME": "name", "STRING": "string", "NUMBER": "number", "COMMENT": "comment", "OP": "operator"}
# Tests are like no other code, tables of codecs and documentation no code at all
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}


def python_sources(split: str = "train", length: int | None = None) -> "Dataset":
    """The running Python's standard library, bytes and their labels: a `datasets.Dataset`, about 10 MB.

    `path` in the library, `input_ids` (T,), bytes, and `labels` (T,), see `byte_labels`. Tests, installed packages,
    tables of codecs, empty files and those in another encoding than UTF-8 are left out.

    Args:
        split: "train", or "test": the tenth of the files that a hash of their path chooses, other bytes of no file.
        length: files are cut into pieces of so many bytes, the last of a file maybe shorter; None: they are whole.

    Raises:
        ValueError: another split, or a length less than 1.
    """
    from datasets import Dataset

    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if length is not None and length < 1:
        raise ValueError(f"length: expected at least 1, got {length}")
    rows: dict[str, list] = {"path": [], "input_ids": [], "labels": []}
    for path, source in _sources():
        if _is_held_out(path) != (split == "test"):
            continue
        ids, labels = np.frombuffer(source, np.uint8), byte_labels(source)
        for start in range(0, len(source), length or len(source)):
            piece = slice(start, start + (length or len(source)))
            for name, value in zip(rows, (path, ids[piece], labels[piece]), strict=True):
                rows[name].append(value)
    return Dataset.from_dict(rows).with_format("torch")


def python_texts(split: str = "train") -> list[str]:
    """The files of `python_sources` whole, as texts without labels."""
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    return [source.decode() for path, source in _sources() if _is_held_out(path) == (split == "test")]


def python_documentation() -> tuple[str, str]:
    """The language reference inside the running CPython, the topics of `help()`, 0.5 MB of English and code: all but
    the last 5% of its characters, and these, on which is measured what learned from the others."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    cut = len(text) - int(len(text) * HELD_OUT)
    return text[:cut], text[cut:]


def _sources() -> Iterator[tuple[str, bytes]]:
    """Path in the library and text of every file."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        if not _LEFT_OUT & set(place.parts) and (source := path.read_bytes()) and _is_utf8(source):
            yield place.as_posix(), source


def _is_utf8(source: bytes) -> bool:
    return tokenize.detect_encoding(io.BytesIO(source).readline)[0] == "utf-8"


def _is_held_out(path: str) -> bool:
    return hashlib.sha256(path.encode()).digest()[0] % 10 == 0


def byte_labels(source: bytes) -> np.ndarray:
    """What each byte of a Python source is part of, by `tokenize`: (T,) uint8, places in `LABELS`.

    Whitespace is all that is in no token: newlines, indentation, form feeds and the backslashes that continue lines.
    Keywords are those that never are names: `match` is a name. A string has its prefix and quotes, and an f-string all
    that is in its braces, as for Python before 3.12.

    Raises:
        ValueError: it is declared to be in another encoding than UTF-8, or has a byte order mark.
        tokenize.TokenError, SyntaxError: it is no Python.
    """
    if not _is_utf8(source):
        raise ValueError("source: expected UTF-8 without a byte order mark, got another encoding")
    lines = list(io.BytesIO(source))
    starts = list(accumulate(map(len, lines), initial=0))

    def offset(place: tuple[int, int]) -> int:
        """In bytes, of a row and a column of characters."""
        row, column = place
        return starts[row - 1] + len(lines[row - 1].decode()[:column].encode())

    labels, opened = np.zeros(len(source), np.uint8), []
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "ERRORTOKEN":
            raise tokenize.TokenError(f"source: {token.string!r} is no Python", token.start)
        if kind.endswith("STRING_START"):
            opened.append(offset(token.start))
        elif kind.endswith("STRING_END"):
            labels[opened.pop() : offset(token.end)] = LABELS.index("string")
        elif kind in _NAMES:
            name = "keyword" if keyword.iskeyword(token.string) else _NAMES[kind]
            labels[offset(token.start) : offset(token.end)] = LABELS.index(name)
    return labels
