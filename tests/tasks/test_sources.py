"""Labels by hand and beside `ast`, which counts bytes itself and knows no tokens; files in one split only."""

import ast
import itertools
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_rnn.tasks import byte_labels, python_sources
from hf_rnn.tasks.sources import LABELS, _is_held_out, _sources

LETTERS = "_nksdco"  # of LABELS


def read(source: str) -> str:
    return "".join(LETTERS[label] for label in byte_labels(source.encode()))


@pytest.mark.parametrize(
    "source, labels",
    [
        ("if x: # y\n", "kk_no_ccc_"),
        ("é = 'ß'  # ü\r\n", "nn_o_ssss__cccc__"),
        ("x\\\n= 0x1F\n", "n__o_dddd_"),
        ("\x0cclass A:\n\tpass\n", "_kkkkk_no__kkkk_"),
        ('"""ä\n\nb"""; 1', "s" * 11 + "o_d"),
        ("match = not_a\n", "nnnnn_o_nnnnn_"),
        ("None, a.b", "kkkko_non"),
        ("f'ä{x + 1:>{n}}{{' + rb'q'", "s" * 19 + "_o_sssss"),
        ("f'{f\"{x}\"}' 1", "s" * 11 + "_d"),
        ("", ""),
    ],
)
def test_by_hand(source, labels):
    assert read(source) == labels


def read_by_ast(node: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Names and constants outside f-strings, and these as a whole, with their labels."""
    if isinstance(node, ast.JoinedStr):
        yield node, "string"
        return
    if isinstance(node, ast.Name):
        yield node, "name"
    elif isinstance(node, ast.Constant) and node.value is not ...:
        kinds = {str: "string", bytes: "string", int: "number", float: "number", complex: "number"}
        yield node, kinds.get(type(node.value), "keyword")
    for child in ast.iter_child_nodes(node):
        yield from read_by_ast(child)


@pytest.mark.parametrize("module", ["ast.py", "textwrap.py", "heapq.py"])  # the last one is not ASCII
def test_beside_ast(module):
    source = (Path(sysconfig.get_path("stdlib")) / module).read_bytes()
    assert source.isascii() == (module != "heapq.py")
    lines = [0, *itertools.accumulate(len(line) + 1 for line in source.split(b"\n"))]
    labels, found = byte_labels(source), Counter()
    for node, label in read_by_ast(ast.parse(source)):
        start, end = lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset
        assert labels[start] == labels[end - 1] == LABELS.index(label)  # in between, strings may be several
        assert label != "name" or len(set(labels[start:end])) == 1
        found[label] += 1
    assert len(found) == 4 and found["name"] > 50


def test_what_is_no_python_or_no_utf8():
    for source in (b"x = 'open\n", b"(", b"if x:\n    y\n  z\n"):
        with pytest.raises((tokenize.TokenError, SyntaxError)):
            byte_labels(source)
    for source in (b"# coding: latin-1\n\xe9 = 1\n", b"\xef\xbb\xbfx = 1\n"):
        with pytest.raises(ValueError, match="source: expected UTF-8"):
            byte_labels(source)


@pytest.fixture
def few(monkeypatch):
    files = [("a.py", b"x = 1\n"), ("b.py", b"# b\n"), ("c/c.py", b"def f(): pass\n"), ("wave.py", b"y\n")]
    monkeypatch.setattr("hf_rnn.tasks.sources._sources", lambda: iter(files))
    monkeypatch.setattr("hf_rnn.tasks.sources._is_held_out", lambda path: path == "b.py")
    return dict(files)


def test_rows(few):
    rows = python_sources()
    assert rows["path"] == ["a.py", "c/c.py", "wave.py"]
    assert rows[0]["input_ids"].tolist() == list(b"x = 1\n") and rows[0]["input_ids"].dtype == torch.long
    assert [row["labels"].tolist() for row in rows] == [byte_labels(few[path]).tolist() for path in rows["path"]]
    pieces = python_sources(length=4)
    assert [bytes(row["input_ids"].tolist()) for row in pieces] == [
        b"x = ", b"1\n", b"def ", b"f():", b" pas", b"s\n", b"y\n",
    ]  # fmt: skip
    joined = torch.cat([row["labels"] for row in pieces])
    assert joined.equal(torch.cat([row["labels"] for row in rows]))
    assert python_sources("test")["path"] == ["b.py"]


def test_splits():
    """By the path alone, so that the same files are held out everywhere; a tenth of the bytes or so."""
    files = {path: len(source) for path, source in _sources()}
    held_out = {path for path in files if _is_held_out(path)}
    assert len(files) > 300 and "ast.py" in files
    folders = {part for path in files for part in path.split("/")[:-1]}
    assert folders >= {"json", "asyncio"} and not folders & {"test", "idle_test", "encodings", "site-packages"}
    assert 0.05 < sum(files[path] for path in held_out) / sum(files.values()) < 0.2
    assert _is_held_out("asyncio/unix_events.py") and not _is_held_out("heapq.py")


@pytest.mark.parametrize("settings, name", [(dict(split="valid"), "split"), (dict(length=0), "length")])
def test_bad_settings(settings, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        python_sources(**settings)
