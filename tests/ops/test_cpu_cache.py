"""Compiled loops on disk: never another version's, and never in the way."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import hf_rnn_kernels
from hf_rnn_kernels import min_gru_scan, operators, threads

numba = pytest.importorskip("numba")
cpu_cache = pytest.importorskip("hf_rnn_kernels.cpu_cache")

PACKAGE = Path(hf_rnn_kernels.__file__).parent
EDITED = """
import pathlib, shutil, sys, torch
sys.path.insert(0, sys.argv[1])
from hf_rnn_kernels import swiglu

x = torch.ones(2**9, 2**9)
before = swiglu(x)
for name in [name for name in sys.modules if name.startswith("hf_rnn_kernels")]:
    del sys.modules[name]
source = pathlib.Path(sys.argv[1], "hf_rnn_kernels", "vector_math.py")
text = source.read_text()
assert "    return e * large, large\\n" in text
source.write_text(text.replace("    return e * large, large\\n", "    return e * large, TWO * large\\n"))
from hf_rnn_kernels import swiglu
torch.testing.assert_close(swiglu(x), 2 * before)
"""


def double(x):
    for i in range(x.size):
        x[i] *= 2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    cpu_cache._warn.cache_clear()
    yield tmp_path / "cache"
    cpu_cache._warn.cache_clear()


def run(*dtypes):
    """Whether a fresh dispatcher finds the loop for each dtype in the cache; its results are right."""
    loop = cpu_cache.loop()(double)
    for dtype in dtypes:
        x = torch.arange(5, dtype=dtype)
        loop(x.numpy())
        assert x.tolist() == [0, 2, 4, 6, 8]
    return list(loop.stats.cache_hits.values()) == [1] * len(dtypes)


def test_an_edited_inlined_function_is_compiled_again(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "site" / "hf_rnn_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", EDITED, str(tmp_path / "site")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]


def test_every_source_counts(tmp_path):
    root = tmp_path / "hf_rnn_kernels"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    assert cpu_cache._digest(root) == cpu_cache._digest(PACKAGE)
    seen = {cpu_cache._digest(root)}
    names = "vector_math.py", "matrix_product.py", "recurrent_scan/cpu_cells.py", "mlstm_scan/cpu_chunks.py"
    for name in (*names, "coding/ans.py"):
        (root / name).write_text((root / name).read_text() + "\n")
        assert cpu_cache._digest(root) not in seen, name
        seen.add(cpu_cache._digest(root))
    (root / "gated_scan" / "triton.py").write_text("")
    assert cpu_cache._digest(root) in seen


def test_what_is_kept_is_found(folder, monkeypatch):
    """Each signature by itself, whoever wrote it; nothing of another version."""
    assert not run(torch.float32)
    assert not run(torch.int64)
    assert run(torch.float32, torch.int64)
    monkeypatch.setattr(cpu_cache, "_DIGEST", "another")
    assert not run(torch.float32)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + b"x" + b[-8:]])
def test_a_damaged_file_is_compiled_again(folder, damage):
    run(torch.float32)
    (file,) = cpu_cache.folder().iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(RuntimeWarning, match=f"{file.name}: damaged"):
        assert not run(torch.float32)
    assert run(torch.float32)


@pytest.mark.parametrize("place", ["below a file", "no home"])
def test_no_folder_to_write_to(folder, monkeypatch, place):
    folder.write_text("")
    if place == "no home":
        monkeypatch.setattr(numba.config, "CACHE_DIR", "")
        monkeypatch.setattr(cpu_cache.AppDirs, "user_cache_dir", "~/.cache/numba")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not run(torch.float32)
        assert not run(torch.int64)
    assert len(caught) == 1 and "NUMBA_CACHE_DIR" in str(caught[0].message)
    assert not Path("~").exists()


def test_old_versions_do_not_pile_up(folder):
    for n in range(12):
        old = folder / f"{cpu_cache._NAME}{n}"
        old.mkdir(parents=True)
        os.utime(old, (n, n))
    (folder / "somebody_elses").mkdir()
    run(torch.float32)
    kept = [f"{cpu_cache._NAME}{n}" for n in range(4, 12)]
    assert sorted(p.name for p in folder.iterdir()) == sorted([*kept, "somebody_elses", cpu_cache.folder().name])


def test_a_numba_that_cannot_be_imported(tmp_path, monkeypatch):
    x = [torch.randn(2, 7, 5) for _ in range(2)]
    expected = min_gru_scan(*x)
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.setattr(threads, "_numba", None)
    operators._slow.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [min_gru_scan(*x) for _ in range(2)]
    told = [str(warning.message) for warning in caught]
    assert sum("NumPy 2.3" in message for message in told) == 1 == sum("loops over time" in message for message in told)
    for result in results:
        torch.testing.assert_close(result, expected)
