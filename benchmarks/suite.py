"""The questions, one after another, each in a process of its own.

    python benchmarks/suite.py speed                        # make bench
    python benchmarks/suite.py quality --data text.txt      # make bench-quality
    python benchmarks/suite.py check                        # make bench-check

Both go on where they were interrupted, part by part. "check" measures the speed questions anew, elsewhere, and compares
ratios with the committed ones, the least favourable of the runs that a results file remembers; a question in which
something is more than 15% worse is measured again, up to twice, and what is worse each time is named. For a GPU there
is gpu.py.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SPEED = [
    "kernels",
    "layers",
    "recurrent",
    "bidirectional",
    "training_step",
    "layouts",
    "decoding",
    "decoding_sizes",
    "long_sequences",
    "xlstm",
    "min_against_traditional",
    "exported",
]
QUALITY = [
    "demo", "quality", "weight_bits", "streams", "state_tracking", "classification", "tagging",
    "digits_ctc", "language_model", "zero_order", "zero_order_memory", "zero_order_race",
    "memory_scaling", "memory_retrieval", "memory_drift", "memory_tasks", "memory_language", "memory_preset_tasks",
    "memory_sequential", "rate_constrained", "coding", "planning", "faults", "states", "assisted", "serving",
]  # fmt: skip
WITH_DATA = {"quality", "weight_bits", "streams"}  # questions about a text
WORSE = 0.15
TRIES = 3  # a busy neighbour on the same cores halves the speed of some for minutes, not of all (docs/log.md)


def measure(question: str, *arguments: str, results: Path | None = None) -> bool:
    """Whether it went well."""
    start = time.perf_counter()
    print(f"\n=== {question}", flush=True)
    environment = os.environ | ({"HF_RNN_RESULTS": str(results)} if results else {})
    command = [sys.executable, str(HERE / f"{question}.py"), *arguments]
    code = subprocess.run(command, env=environment).returncode
    print(f"=== {question}: {time.perf_counter() - start:.0f} s{f', FAILED ({code})' if code else ''}", flush=True)
    return code == 0


def worse(committed: dict, measured: dict) -> dict[str, str]:
    """What fell behind, by the row's name: a peer's time over ours is more than 15% less than the least of the runs in
    the file, or ours by another way ("hf_rnn, compiled") more than the most, or something is not there any more."""
    import driver

    runs = [driver.find_ratios(committed["results"]), *(run["ratios"] for run in committed.get("other_runs", []))]
    now, found = driver.find_ratios(measured["results"]), {}
    for row, latest in runs[0].items():
        if latest is None:
            continue
        if (after := now.get(row)) is None:
            found[row] = f"{row}: was {latest:.2f} times ours, now not measured"
            continue
        ours = row.rpartition(" / ")[2].startswith("hf_rnn")
        before = (max if ours else min)(run[row] for run in runs if run.get(row) is not None)
        share = before / after if ours else after / before
        if share < 1 - WORSE:
            found[row] = f"{row}: {before:.2f} times ours, now {after:.2f}, {100 * (1 - share):.0f}% worse"
    return found


def check(questions: list[str]) -> int:
    import driver

    behind: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for question in questions:
            committed = json.loads(driver.results_path(question).read_text())
            if committed["device"] != driver.device_name():
                print(f"{question}: committed on {committed['device']}, this is {driver.device_name()}")
            found: dict[str, str] | None = None
            for _ in range(TRIES):
                if not measure(question, results=Path(folder)):
                    found = {"": "failed"}
                    break
                measured = json.loads((Path(folder) / driver.results_path(question).name).read_text())
                latest = worse(committed, measured)
                found = latest if found is None else {row: line for row, line in latest.items() if row in found}
                if not found:
                    break
                print(f"{question}, behind so far:", *found.values(), sep="\n  ", flush=True)
            behind += [f"{question}: {line}" for line in (found or {}).values()]
    print("\n" + ("\n".join(["Worse by more than 15%:", *behind]) if behind else "Nothing is worse by more than 15%."))
    return 1 if behind else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "quality", "check"])
    parser.add_argument("--data", help="a text file; default: CPython's documentation")
    parser.add_argument("--questions", nargs="+", help="only these")
    options = parser.parse_args()
    questions = options.questions or (QUALITY if options.what == "quality" else SPEED)
    if options.what == "check":
        return check(questions)
    data = ["--data", options.data] if options.data else []
    done = [measure(question, *(data if question in WITH_DATA else [])) for question in questions]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
