"""Running numba's parallel loops beside torch."""

import os
import threading
import warnings
from collections.abc import Callable

import torch

from hf_rnn_kernels.transforms import transforming

_launch = threading.Lock()  # numba's portable thread pool aborts the process when two threads start a loop at once
_launched = _forked = False
_numba: bool | None = None


# A lock that another thread held at the fork is never released in the child.
def _after_fork() -> None:
    global _launch, _forked
    _launch, _forked = threading.Lock(), _launched


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _importable() -> bool:
    global _numba
    # When first asked, since importing numba takes a while.
    if _numba is None:
        try:
            import numba  # noqa: F401

            _numba = True
        except Exception as error:  # whatever a numba raises that was built for another NumPy
            if not isinstance(error, ModuleNotFoundError) or error.name != "numba":
                warnings.warn(
                    f"numba cannot be imported, loops run as plain torch: {error}", RuntimeWarning, stacklevel=2
                )
            _numba = False
    return _numba


_importable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result, without its imports


def available() -> bool:
    """Whether numba works and its threads are usable: OpenMP's do not survive a fork, and numba then aborts."""
    return _importable() and not _forked


def worthwhile(x: torch.Tensor) -> bool:
    """Whether an elementwise operation of ours beats torch's: float32 on a CPU, large enough for what a call costs.
    Transforms are torch's alone, and so are exported programs, which are of any size."""
    if torch.compiler.is_exporting():
        return False
    large = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() >= 2**16
    return large and not transforming() and available()


def run(kernel: Callable, *arguments) -> None:
    """Call a parallel numba function with as many threads as torch uses."""
    global _launched
    import numba

    with _launch:
        threads, first, _launched = torch.get_num_threads(), not _launched, True
        # numba has a pool as large as NUMBA_NUM_THREADS and refuses more. Its OpenMP threads spin for work; those of a
        # ThreadPoolExecutor woke about a millisecond late.
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore
        # After torch.set_num_threads(1) a GELU of one token took 7.7 instead of 0.013 ms without this, waiting for a
        # core.
        if first:  # numba launches its pool with omp_set_num_threads(all of them), which is torch's number, too
            torch.set_num_threads(threads)
        # numba takes 2.7 microseconds for a call with 17 arguments in named tuples, 1.3 with plain ones
        kernel(*(tuple(group) if isinstance(group, tuple) else group for group in arguments))
