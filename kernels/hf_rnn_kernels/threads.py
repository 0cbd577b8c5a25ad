"""Running numba's parallel loops beside torch."""

import threading
from collections.abc import Callable

import numba
import torch

_launch = threading.Lock()  # numba's portable thread pool aborts the process when two threads start a loop at once


def run(kernel: Callable, *arguments) -> None:
    """Call a parallel numba function with as many threads as torch uses."""
    with _launch:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore
        kernel(*arguments)
