"""Compiled loops on disk, so that only the first process of a machine waits for numba.

They lie in a folder of numba's cache (`NUMBA_CACHE_DIR`, or `numba` in the user's cache folder) whose name is a digest
of all that they are made of. numba's own cache knows a loop by its file alone, and would run what was compiled from an
older version of the functions inlined from others; and its index, written by two processes at once, can lead from one
signature to another's code.
"""

import functools
import hashlib
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import llvmlite
import numba
import numpy
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

_NAME, _KEPT = "hf_rnn_kernels-", 8  # folders of other versions that stay, the last ones written


def _digest(root: Path) -> str:
    """Of the package's sources, but for Triton's, and of what compiles them."""
    # The whole package and not one loop's own imports: a digest of too much compiles again, one of too little runs old
    # code.
    sources = [path for path in sorted(root.rglob("*.py")) if not path.name.startswith("triton")]
    hashes = [(str(path.relative_to(root)), hashlib.sha256(path.read_bytes()).digest()) for path in sources]
    # What numba keeps is pickled and linked by these.
    versions = [sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, numpy.__version__]
    return hashlib.sha256(repr((hashes, versions)).encode()).hexdigest()[:24]


_DIGEST = _digest(Path(__file__).parent)


def folder() -> Path:
    """Where the loops of these sources lie.

    Raises:
        OSError: the user has no home.
    """
    own = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    root = os.path.expanduser(own) if own else AppDirs("numba", appauthor=False).user_cache_dir
    if root.startswith("~"):
        raise FileNotFoundError("the user has no home")
    return Path(root) / f"{_NAME}{_DIGEST}"


def _make_folder() -> None:
    if folder().is_dir():
        return
    folder().mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # another process removes them
        # Several stay, so that two checkouts in turn do not remove each other's.
        others = sorted(folder().parent.glob(f"{_NAME}*"), key=lambda path: path.stat().st_mtime)
        for old in others[: -_KEPT - 1]:
            shutil.rmtree(old, ignore_errors=True)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


class LoopCache(NullCache):
    """A file for each signature of a loop: a checksum, and what numba keeps of a compilation."""

    def __init__(self, loop: Callable):
        self._loop = f"{loop.__module__}.{loop.__qualname__}"

    def _path(self, signature: tuple, codegen) -> Path:
        key = hashlib.sha256(repr((signature, codegen.magic_tuple())).encode()).hexdigest()[:24]  # the CPU's features
        return folder() / f"{self._loop}-{key}"

    def load_overload(self, sig, target_context):
        # As numba's own cache does, lest the context is not initialised yet.
        target_context.refresh()
        try:
            path = self._path(sig, target_context.codegen())
            content = path.read_bytes()
        except OSError:
            return None
        checksum, data = content[:32], content[32:]
        # Machine code of a damaged file would run.
        if hashlib.sha256(data).digest() != checksum:
            _warn(f"{path}: damaged; compiling this loop again")
            return None
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def save_overload(self, sig, data):
        if data.library.has_dynamic_globals:  # addresses of this process
            return
        content = dumps(data._reduce())
        try:
            path = self._path(sig, data.codegen)
            _make_folder()
            # Renamed into place, so that another process reads a whole file or none.
            written = path.with_name(f"{path.name}.{os.getpid()}")
            written.write_bytes(hashlib.sha256(content).digest() + content)
            written.replace(path)
        except OSError as error:
            _warn(
                f"compiled loops cannot be kept ({error.strerror or error}), so each process compiles them anew; set "
                "NUMBA_CACHE_DIR to a folder that can be written to"
            )


def loop(**options) -> Callable:
    """numba's `njit`, parallel or at least without the interpreter's lock, kept in the cache."""

    def compiled(function: Callable) -> Callable:
        # Other threads of Python go on meanwhile.
        dispatcher = numba.njit(nogil=True, **options)(function)
        # `cache=True` would put numba's own there.
        dispatcher._cache = LoopCache(function)
        return dispatcher

    return compiled
