import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).with_name("wheels.txt")


@pytest.fixture(scope="session")
def wheel(request):
    """A downloaded package as an open zip file, by the beginning of its name; in pytest's cache, which git ignores."""
    folder = request.config.cache.mkdir("wheels")
    if len(list(folder.glob("*.whl"))) < REQUIREMENTS.read_text().count("--hash"):
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        pip = [sys.executable, "-m", "pip", "download", *options, "-r", str(REQUIREMENTS)]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot download the wheels: {done.stderr.strip().splitlines()[-1]}")
    return lambda name: zipfile.ZipFile(next(folder.glob(f"{name}-*.whl")))
