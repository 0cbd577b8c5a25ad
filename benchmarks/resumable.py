"""Long questions: many runs, each kept as soon as it is done; what was interrupted goes on where it was."""

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from driver import commit, device_name, results_path
from tqdm import tqdm


def partial_path(question: str) -> Path:
    """Where the runs done so far are kept until all are; git ignores it."""
    return results_path(question).with_suffix(".partial.json")


def run_all(question: str, function: Callable[..., dict], jobs: dict[str, tuple]) -> dict[str, dict]:
    """`function(*arguments)` for every name in `jobs`; on a CPU one process with one thread for each core.

    Args:
        function: a module's own, with arguments that can be pickled.
        jobs: a name that says what the run is, to arguments.

    Returns:
        Name to what the function returned and the commit it ran at, in the order of `jobs`. Runs that an earlier call
        finished on the same device are taken from `results/<question>_<device>.partial.json`; remove that file to
        begin anew, or `finish(question)` does when the results are saved.
    """
    path, done = partial_path(question), {}
    if path.exists():
        saved = json.loads(path.read_text())
        if saved["device"] != device_name():
            raise ValueError(f"{path} was begun on {saved['device']}, this is {device_name()}; remove it first")
        done = saved["runs"]
    missing = {name: arguments for name, arguments in jobs.items() if name not in done}
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread)
    with pool, tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=question, unit="run") as bar:
        futures = {pool.submit(function, *arguments): name for name, arguments in missing.items()}
        for future in as_completed(futures):
            done[futures[future]] = future.result() | {"commit": commit()}
            path.write_text(json.dumps({"device": device_name(), "runs": done}, indent=1))
            bar.update()
    return {name: done[name] for name in jobs}


def _one_thread() -> None:
    torch.set_num_threads(1)


def finish(question: str) -> None:
    partial_path(question).unlink(missing_ok=True)
