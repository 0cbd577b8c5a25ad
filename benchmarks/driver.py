"""One way to measure, for every benchmark: correct first, then contestants in turn, medians and ratios, one JSON file.

A contestant is a function without arguments that does the work once and returns tensors to check. Whoever is wrong is
not timed; the result says so.
"""

import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from torch import Tensor

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "transformers", "numba", "triton", "minGRU-pytorch", "accelerated-scan", "fla-core")


def relative_error(x: Tensor, reference: Tensor) -> float:
    """RMS(x - reference) / RMS(reference), in float64."""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return float((x - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt().clamp_min(1e-300))


def compare(
    contestants: dict[str, Callable[[], list[Tensor]]],
    reference: list[Tensor] | None = None,
    tolerance: float = 1e-4,
    repeats: int = 10,
    warmup: int = 2,
) -> dict[str, dict]:
    """Measure contestants side by side.

    Args:
        contestants: name to function; the first is what the others are ratios to.
        reference: what each must return, to `tolerance` in relative RMS error; None for contestants of other work
            (a bare matrix product, say), which return nothing.
        repeats: rounds; in each every contestant runs once, so that a drifting machine is unfair to none.

    Returns:
        Per contestant: error, milliseconds (median, min, max), peak_mib beyond what was there before, and ratio, its
        median over the first's.
    """
    rows: dict[str, dict] = {}
    for name, run in contestants.items():
        for _ in range(warmup):
            outputs = run()
        error = None
        if reference is not None and outputs is not None:
            error = max(relative_error(x, y) for x, y in zip(outputs, reference, strict=True))
        rows[name] = {"error": error, "peak_mib": peak_mib(run)}
        if error is not None and not error <= tolerance:
            rows[name]["refused"] = f"wrong: relative error {error:.2e} > {tolerance:.0e}"
        del outputs
    timed = {name: run for name, run in contestants.items() if "refused" not in rows[name]}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, run in timed.items():
            _synchronize()
            start = time.perf_counter()
            run()
            _synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    first = statistics.median(next(iter(times.values())))
    for name, milliseconds in times.items():
        rows[name] |= {
            "ms": statistics.median(milliseconds),
            "ms_min": min(milliseconds),
            "ms_max": max(milliseconds),
            "ratio": statistics.median(milliseconds) / first,
        }
    return rows


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib(run: Callable) -> float:
    """Peak memory of one run beyond what was in use before: the GPU's, or else the process's, sampled."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(0, peak - before) / 2**20


def table(title: str, rows: dict[str, dict]) -> None:
    """Print what `compare` returned."""
    print(f"\n{title}")
    print(f"  {'':34} {'median ms':>10} {'min':>9} {'max':>9} {'ratio':>8} {'MiB':>8} {'error':>9}")
    for name, row in rows.items():
        if "refused" in row:
            print(f"  {name:34} not timed: {row['refused']}")
            continue
        error = "" if row["error"] is None else f"{row['error']:9.1e}"
        print(
            f"  {name:34} {row['ms']:10.3f} {row['ms_min']:9.3f} {row['ms_max']:9.3f} {row['ratio']:8.2f}"
            f" {row['peak_mib']:8.1f} {error}"
        )


def device_name() -> str:
    """The GPU's, or the CPU's with the number of threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


def results_path(question: str) -> Path:
    """`results/<question>_<cpu or gpu>.json`."""
    return RESULTS / f"{question}_{'gpu' if torch.cuda.is_available() else 'cpu'}.json"


def save(question: str, results: dict) -> Path:
    """Write `results/<question>_<cpu or gpu>.json` with device, date, commit, versions and command."""
    record = {
        "question": question,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "commit": _git("rev-parse", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "--", "hf_rnn", "kernels", "trainers") else ""),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "command": " ".join(["python", *sys.argv]),
        "results": results,
    }
    path = results_path(question)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nsaved {path}")
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"
