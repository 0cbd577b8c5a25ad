"""Processes that have not the package, and a Hub on this machine."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from hub.fake_hub import FakeHub

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """`run(code, cwd, **environment)` in a virtual environment with everything that is installed but hf_rnn."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A line of a .pth file is a folder to look in; the .pth files in that folder, an editable install's, are not read
    (site / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        caches = {"HF_HOME": str(cwd / "home"), "HF_MODULES_CACHE": str(cwd / "modules")}
        return subprocess.run(
            [str(folder / "bin" / "python"), "-c", code],
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=kept | THREADS | caches | environment,
            capture_output=True,
            text=True,
            timeout=250,
        )

    absent = run("import hf_rnn", folder)
    assert "No module named 'hf_rnn'" in absent.stderr, absent.stderr
    return run


@pytest.fixture(scope="session")
def python():
    """`run(code, cwd, **environment)` where the package is installed."""

    def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        caches = {"HF_HOME": str(cwd / "home"), "HF_MODULES_CACHE": str(cwd / "modules")}
        return subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=os.environ | THREADS | caches | environment,
            capture_output=True,
            text=True,
            timeout=250,
        )

    return run


@pytest.fixture(scope="module")
def fake_hub():
    with FakeHub() as hub:
        yield hub
        assert not hub.unhandled, hub.unhandled
