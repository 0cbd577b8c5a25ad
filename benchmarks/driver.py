"""One way to measure, for every benchmark: correct first, then contestants in turn, medians and ratios, one JSON file.

A contestant is a function without arguments that does the work once and returns tensors to check, or None if its work
is another (a bare matrix product, say). Whoever is wrong is not timed; the result says so.
"""

import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, tells of every start

import torch
from torch import Tensor

# `suite.py check` measures anew without touching what is committed
RESULTS = Path(os.environ.get("HF_RNN_RESULTS", Path(__file__).with_name("results")))
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DRY = os.environ.get("HF_RNN_DRY") == "1"  # `make gpu DRY=1`: what a GPU would run, tiny, in Triton's interpreter
LIKE_GPU = GPU or DRY
torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in cuDNN's recurrences and convolutions, too
if DRY:
    import interpreter

    interpreter.use()
PACKAGES = (
    "torch", "transformers", "numba", "triton", "minGRU-pytorch", "xlstm", "mlstm_kernels", "flashrnn", "mambapy",
    "accelerated-scan", "fla-core", "statsforecast", "statsmodels", "aeon",
)  # fmt: skip
Rows = dict[str, dict[str, Any]]
Size = TypeVar("Size")
LOST: set[str] = set()  # contestants that `measure` leaves out


class DeviceLost(RuntimeError):
    """An illegal address, say: nothing can be computed any more in this process."""

    def __init__(self, contestant: str):
        super().__init__(f"{contestant} took the device from the process")
        self.contestant = contestant


def device_is_lost() -> bool:
    try:
        _synchronize()
    except RuntimeError:
        return True
    return False


def sized(cpu: Size, gpu: Size, dry: Size) -> Size:
    """What is measured on a CPU, on a GPU, and in a rehearsal of the latter."""
    return dry if DRY else gpu if GPU else cpu


def relative_error(x: Tensor, reference: Tensor) -> float:
    """RMS(x - reference) / RMS(reference), in float64."""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return float((x - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt().clamp_min(1e-300))


def compare(
    contestants: dict[str, Callable[[], list[Tensor] | None]],
    *arguments,
    accepted: dict[str, str] | None = None,
    **settings,
) -> Rows:
    """Measure contestants side by side, as `measure`, with `ratios` to the first of them."""
    return ratios(measure(contestants, *arguments, **settings), next(iter(contestants)), accepted)


def measure(
    contestants: dict[str, Callable[[], list[Tensor] | None]],
    reference: list[Tensor] | dict[str, list[Tensor]] | None = None,
    tolerance: float = 1e-4,
    repeats: int = 15,
    seconds: float = 10.0,
) -> Rows:
    """Check contestants, then time them in turn.

    Args:
        contestants: name to function.
        reference: what each must return, in float64, to `tolerance` in relative RMS error; by name where contestants
            answer differently; None where there is nothing to check.
        repeats: rounds; in each every contestant runs once, so that a drifting machine is unfair to none.
        seconds: after so many of them no new round is begun, but three there are.

    Returns:
        Per contestant: error, peak_mib beyond what was there before, and times, milliseconds of each round; or refused,
        why it was not timed. `other_work` marks those that return None.
    """
    rows: Rows = {}
    for name, run in contestants.items():
        rows[name] = row = {"error": None}
        if name in LOST:
            row["refused"] = "left out: it took the device from its process"
            continue
        expected = reference.get(name) if isinstance(reference, dict) else reference
        try:
            outputs = run()  # the first, since a decoder goes on from call to call
            row["peak_mib"] = peak_bytes(run) / 2**20  # what is allocated once is there by now
        except Exception as error:  # a peer's kernel may fail in ways of its own
            row["refused"] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            if device_is_lost():
                raise DeviceLost(name) from error
            continue
        if outputs is None:
            row["other_work"] = True
        elif expected is not None:
            row["error"] = max(relative_error(x, y) for x, y in zip(outputs, expected, strict=True))
            if not row["error"] <= tolerance:
                row["refused"] = f"wrong: relative error {row['error']:.2e} > {tolerance:.0e}"
        del outputs
    timed = {name: run for name, run in contestants.items() if "refused" not in rows[name]}
    for name in timed:
        rows[name]["times"] = []
    begun = time.perf_counter()
    for round_ in range(1 if DRY else repeats):
        if round_ >= 3 and time.perf_counter() - begun > seconds:
            break
        for name, run in timed.items():
            rows[name]["times"].append(milliseconds(run))
    return rows


def ratios(rows: Rows, first: str, accepted: dict[str, str] | None = None) -> Rows:
    """What `measure` returned with the median, min and max ms, and ratio: the median over rounds of a contestant's time
    over that of `first` in the same round. Where another is faster, `accepted` says why that is accepted."""
    summary: Rows = {}
    for name in (first, *(name for name in rows if name != first)):
        row = {key: value for key, value in rows[name].items() if key != "times"}
        if "times" in rows[name]:
            times, base = rows[name]["times"], rows[first].get("times")
            row |= {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
            if base:
                row["ratio"] = statistics.median(t / b for t, b in zip(times, base, strict=True))
                if row["ratio"] < 1 and name in (accepted or {}):
                    row["accepted"] = accepted[name]  # type: ignore[index]
        summary[name] = row
    return summary


def milliseconds(run: Callable) -> float:
    """Of one call."""
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return 1e3 * (time.perf_counter() - start)


def _synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def peak_bytes(run: Callable) -> int:
    """Of tensors at the peak of one call, beyond those that were there before, by what the allocator reports."""
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    if DRY:
        return 0
    # Large results of our loops are in memory that they keep for the next; here torch is to give, and count, them
    with (
        patch("hf_rnn_kernels.arrays._LARGE", math.inf),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


@cache
def limits() -> dict[str, float]:
    """What this machine allows: bytes copied and float32 (bfloat16 on a GPU) operations of a product, each a second."""
    numbers, size = sized(2**26, 2**30, 2**10), sized(2048, 8192, 32)
    source, target = torch.ones(numbers, device=DEVICE), torch.empty(numbers, device=DEVICE)
    x = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16 if GPU else torch.float32)
    out = torch.empty_like(x)
    copies = [milliseconds(lambda: target.copy_(source)) for _ in range(10)]
    products = [milliseconds(lambda: torch.mm(x, x, out=out)) for _ in range(10)]
    return {
        "bytes_per_second": 2 * source.nbytes / (min(copies) / 1e3),
        "operations_per_second": 2 * size**3 / (min(products) / 1e3),
    }


def share_of_limit(row: dict, bytes_: float, operations: float) -> None:
    """Add to a row how near it comes to the time that its traffic and its products alone would take, and to the longer
    of both, its limit."""
    if "ms" in row:
        copy = 1e3 * bytes_ / limits()["bytes_per_second"]
        products = 1e3 * operations / limits()["operations_per_second"]
        row |= {"share_of_copy": copy / row["ms"], "share_of_products": products / row["ms"]}
        row |= {"limit_ms": max(copy, products), "share_of_limit": max(copy, products) / row["ms"]}


@contextmanager
def compilations():
    """Yields a list that gets an entry for each kernel compiled, by numba or by Triton."""
    found: list[str] = []
    if GPU:
        from triton import knobs

        hook, knobs.runtime.jit_post_compile_hook = (
            knobs.runtime.jit_post_compile_hook,
            lambda *_, repr=None, **__: found.append(str(repr)),
        )
        try:
            yield found
        finally:
            knobs.runtime.jit_post_compile_hook = hook
        return
    from numba.core import event

    with event.install_recorder("numba:compile") as recorder:
        yield found
    found += [str(entry) for _, entry in recorder.buffer]


def table(title: str, rows: Rows) -> None:
    """Print what `compare` returned."""
    print(f"\n{title}")
    print(f"  {'':34} {'median ms':>10} {'min':>9} {'max':>9} {'ratio':>8} {'MiB':>8} {'error':>9}")
    for name, row in rows.items():
        if "refused" in row:
            print(f"  {name:34} not timed: {row['refused']}")
            continue
        error = "" if row["error"] is None else f"{row['error']:9.1e}"
        print(
            f"  {name:34} {row['ms']:10.3f} {row['ms_min']:9.3f} {row['ms_max']:9.3f} {row.get('ratio', 0):8.2f}"
            f" {row['peak_mib']:8.1f} {error}",
            flush=True,
        )


def device_name() -> str:
    """The GPU's, or the CPU's with the number of threads."""
    return torch.cuda.get_device_name() if GPU else _cpu_name()


def results_path(question: str) -> Path:
    """`results/<question>_<cpu or gpu>.json`."""
    return RESULTS / f"{question}_{'gpu' if GPU else 'cpu'}.json"


def find_ratios(results: dict, place: str = "") -> dict[str, float | None]:
    """Every contestant's ratio, by where it is; None where it was not timed."""
    if "ratio" in results or "refused" in results:
        return {place: results.get("ratio")}
    parts = (
        find_ratios(value, f"{place} / {name}" if place else name)
        for name, value in results.items()
        if isinstance(value, dict)
    )
    return {row: ratio for part in parts for row, ratio in part.items()}


def save(question: str, results: dict) -> Path:
    """Write `results/<question>_<cpu or gpu>.json` with device, date, commit, versions and command, and the ratios of
    the four runs before on the same device, for how far they move."""
    path = results_path(question)
    before = json.loads(path.read_text()) if path.exists() else {}
    others = []
    if before.get("device") == device_name():
        run = {"date": before["date"], "commit": before["commit"], "ratios": find_ratios(before["results"])}
        others = [run, *before.get("other_runs", [])][:4]
    record = {
        "question": question,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "command": _command(),
        "results": results,
    } | ({"other_runs": others} if others and others[0]["ratios"] else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nsaved {path}")
    return path


def _command() -> str:
    """As one says it in the checkout, wherever that and the data are."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def commit() -> str:
    """The checkout's, marked where the package is not as committed; HF_RNN_COMMIT's where a copy has no git."""
    if given := os.environ.get("HF_RNN_COMMIT"):
        return given
    changed = _git("status", "--porcelain", "--", "hf_rnn", "kernels", "trainers", "benchmarks/*.py")
    return _git("rev-parse", "HEAD") + ("+changes" if changed else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
