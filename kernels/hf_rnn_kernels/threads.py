"""Running numba's parallel loops beside torch."""

import importlib.util
import os
import threading
from collections.abc import Callable

import torch

_launch = threading.Lock()  # numba's portable thread pool aborts the process when two threads start a loop at once
_launched = _forked = False


def _after_fork() -> None:
    global _launch, _forked
    _launch, _forked = threading.Lock(), _launched


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def available() -> bool:
    """Whether numba is installed and its threads usable: OpenMP's do not survive a fork, and numba then aborts."""
    return importlib.util.find_spec("numba") is not None and not _forked


def worthwhile(x: torch.Tensor) -> bool:
    """Whether an elementwise operation of ours beats torch's: float32 on a CPU, large enough for what a call costs."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() >= 2**16 and available()


def run(kernel: Callable, *arguments) -> None:
    """Call a parallel numba function with as many threads as torch uses."""
    global _launched
    import numba

    with _launch:
        threads, first, _launched = torch.get_num_threads(), not _launched, True
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore
        if first:  # numba launches its pool with omp_set_num_threads(all of them), which is torch's number, too
            torch.set_num_threads(threads)
        kernel(*arguments)
