"""Long questions: many runs, each kept as soon as it is done; what was interrupted goes on where it was."""

import hashlib
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import driver
import torch
from driver import commit, device_name, results_path
from tqdm import tqdm

TRIES = 2  # of a part that ends its process or does not end, at the same sources
AGAIN = 75  # exit code: this process can measure no more, another goes on
ROOT = Path(__file__).resolve().parents[1]


def partial_path(question: str) -> Path:
    """Where the runs done so far are kept until all are; git ignores it."""
    return results_path(question).with_suffix(".partial.json")


def read_partial(question: str) -> dict:
    """What an earlier call left: `runs`, name to result, and what else it kept."""
    path = partial_path(question)
    if not path.exists():
        return {"device": device_name(), "runs": {}}
    saved = json.loads(path.read_text())
    if saved["device"] != device_name():
        raise ValueError(f"{path} was begun on {saved['device']}, this is {device_name()}; remove it first")
    return saved


def write_partial(question: str, saved: dict) -> None:
    path = partial_path(question)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=1))


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
    saved = read_partial(question)
    done = saved["runs"]
    missing = {name: arguments for name, arguments in jobs.items() if name not in done}
    workers = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread)
    with pool, tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=question, unit="run") as bar:
        futures = {pool.submit(function, *arguments): name for name, arguments in missing.items()}
        for future in as_completed(futures):
            done[futures[future]] = future.result() | {"commit": commit()}
            write_partial(question, saved)
            bar.update()
    return {name: done[name] for name in jobs}


def _one_thread() -> None:
    torch.set_num_threads(1)


class Parts:
    """The parts of a question of speed, measured one after another in this process.

    As with `run_all` a part is kept when it is done and not measured again. One that fails says so and the others run;
    a later call tries it again, but not a third time at the same sources. Who takes the device from the process is left
    out from then on.
    """

    def __init__(self, question: str):
        self.question, self.failed = question, {}
        self.saved = read_partial(question)
        if self.saved.get("sources") != sources():
            self.saved |= {"sources": sources(), "tries": {}, "lost": []}
        driver.LOST.update(self.saved["lost"])

    def run(self, name: str, function: Callable[..., dict], *arguments) -> dict | None:
        """What `function(*arguments)` returned, now or in an earlier call; None if it failed."""
        runs, tries = self.saved["runs"], self.saved["tries"]
        if name in runs:
            return runs[name]["result"]
        if tries.get(name, 0) >= TRIES:
            self.failed[name] = f"given up after {TRIES} tries"
            return None
        tries[name] = tries.get(name, 0) + 1
        write_partial(self.question, self.saved)  # before it can end this process
        try:
            runs[name] = {"result": function(*arguments), "commit": commit()}
        except driver.DeviceLost as error:
            print(f"{name}: {error}", flush=True)
            tries[name] -= 1
            self.saved["lost"].append(error.contestant)
        except Exception as error:
            traceback.print_exc()
            self.failed[name] = f"{type(error).__name__}: {error}"[:300]
        write_partial(self.question, self.saved)
        if name not in runs and driver.device_is_lost():
            sys.exit(AGAIN)
        return runs[name]["result"] if name in runs else None

    def finish(self, results: dict) -> None:
        """Save results; where a part failed keep the others for a later call, and exit with 1."""
        now, runs = commit(), self.saved["runs"]
        notes = {
            "failed": self.failed,
            "at_other_commits": {n: r["commit"] for n, r in runs.items() if r["commit"] != now},
        }
        driver.save(self.question, results | {what: parts for what, parts in notes.items() if parts})
        if self.failed:
            sys.exit(1)
        finish(self.question)


def sources() -> str:
    """A hash of all code that results depend on."""
    folders = ("hf_rnn", "kernels", "trainers", "benchmarks", "tests")
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def finish(question: str) -> None:
    partial_path(question).unlink(missing_ok=True)
