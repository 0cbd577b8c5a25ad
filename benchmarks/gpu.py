"""Everything that wants a GPU, in steps of at most eight minutes that go on where they were stopped.

    python benchmarks/gpu.py                     # make gpu
    python benchmarks/gpu.py a decoding          # make gpu STEPS="a decoding": a step, or a question of one, alone
    python benchmarks/gpu.py --dry               # make gpu DRY=1: tiny, in Triton's interpreter, without a GPU

Whatever fails or takes too long, the rest still runs. A step goes on with the questions that are not done at these
sources, a question with the parts that are not; named by itself a question is measured anew. The summary is made of
results/gpu_steps_gpu.json, which is written as the steps go, and of the results beside it.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 480  # of a step
CRASHES = 5  # processes that lose the device or die, of one question
STEPS = {
    "a": [["gpu_tests"]],
    "b": [["kernels"], ["layers"], ["recurrent"], ["min_against_traditional"]],
    "c": [["training_step"], ["decoding_7b"], ["decoding"], ["xlstm"]],
    "d": [["zero_order_billion", "--minutes", "5"], ["zero_order"]],
    "e": [["memory_paper", "--minutes", "6"]],
}
QUESTIONS = {command[0]: command for commands in STEPS.values() for command in commands}
SHOWN = 3  # lines of the summary for what is wrong or slow in a question


def run(command: list[str], seconds: float) -> str:
    """How it ended: "done", "stopped" by the limit, or "failed" and how."""
    from resumable import AGAIN

    end = time.perf_counter() + seconds
    for _ in range(CRASHES):
        process = subprocess.Popen([sys.executable, str(HERE / f"{command[0]}.py"), *command[1:]], process_group=0)
        try:
            code = process.wait(timeout=max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            if process.poll() is None:  # with what it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code != AGAIN and code >= 0:
            return "done" if code == 0 else f"failed ({code})"
    return f"failed (ended {CRASHES} times, at last with {code})"


def run_steps(names: list[str]) -> bool:
    """Whether all is done."""
    from driver import results_path, save
    from resumable import sources

    path = results_path("gpu_steps")
    states = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in names:
        end = time.perf_counter() + SECONDS
        for command in STEPS.get(name) or [QUESTIONS[name]]:
            question, begun = command[0], time.perf_counter()
            before = states.get(question, {})
            if name in STEPS and before.get("state") == "done" and before["sources"] == sources():
                continue
            print(f"\n=== {question}", flush=True)
            state = run(command, end - begun) if end - begun > 10 else "stopped"
            spent = time.perf_counter() - begun
            states[question] = {"state": state, "seconds": spent, "sources": sources()}
            print(f"=== {question}: {state}, {spent:.0f} s", flush=True)
            save("gpu_steps", states)
    print("\n" + "\n".join(summary(states)))
    return all(states.get(question, {}).get("state") == "done" for question in _questions(names))


def _questions(names: list[str]) -> list[str]:
    return [command[0] for name in names for command in STEPS.get(name) or [QUESTIONS[name]]]


def summary(states: dict[str, dict]) -> list[str]:
    """A line for each question, and a few for what is wrong or slow there."""
    from driver import commit, device_name, results_path
    from resumable import read_partial

    lines = [f"{device_name()}, commit {commit() or 'unknown'}"]
    for step, commands in STEPS.items():
        for question, *_ in commands:
            state = states.get(question, {"state": "not run", "seconds": 0})
            path = results_path(question)
            results = json.loads(path.read_text())["results"] if path.exists() else {}
            first, *others = headlines(question, results)
            if state["state"] != "done" and (kept := len(read_partial(question)["runs"])):
                first += f"; {kept} parts kept for the next call"
            lines.append(f"{step} {question:24} {state['state']:12} {state['seconds']:4.0f} s  {first}"[:160])
            lines += [f"    {line}"[:160] for line in others[:SHOWN]]
            lines += [f"    and {len(others) - SHOWN} more"] if len(others) > SHOWN else []
    return lines


def headlines(question: str, results: dict) -> list[str]:
    """What came out, then what is wrong, then where another is faster."""
    from page import tables

    if tests := results.get("tests"):
        counts = {
            what: [name for name, run in tests.items() if run["outcome"] == what] for what in ("passed", "failed")
        }
        skipped = len(tests) - sum(map(len, counts.values()))
        return [f"{len(counts['passed'])} passed, {len(counts['failed'])} failed, {skipped} skipped", *counts["failed"]]
    if losses := results.get("losses"):
        median = statistics.median(results["seconds"])
        memory = f", {results['gib']:.0f} GiB" if results["gib"] else ""
        steps = f"{len(losses)} steps of {median:.2f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}"
        return [f"{results['parameters']:,} parameters, {steps}{memory}"]
    found = list(tables(results))
    if not found:
        return ["nothing measured"]
    wrong = [f"{title}: {row['refused']}" for title, rows in found if "refused" in (row := next(iter(rows.values())))]
    wrong += [f"{part}: {why}" for part, why in results.get("failed", {}).items()]
    peers = [(row, title, name) for title, rows in found for name, row in list(rows.items())[1:]]
    peers = [(row, title, name) for row, title, name in peers if not row.get("other_work")]
    faster = sorted((row["ratio"], f"{title}: {name}") for row, title, name in peers if row.get("ratio", 1) < 1)
    shares = [row["share_of_limit"] for _, rows in found for row in rows.values() if "share_of_limit" in row]
    limit = f", {100 * min(shares):.0f} to {100 * max(shares):.0f}% of the limit" if shares else ""
    text = f"{len(found)} tables, {len(wrong)} without ours, another faster in {len(faster)}{limit}"
    return [text, *wrong, *(f"{ratio:.2f} times as long, {who}" for ratio, who in faster)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, *QUESTIONS, []], help="default: all")
    parser.add_argument("--dry", action="store_true", help="a rehearsal without a GPU")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if options.dry:
        os.environ |= {"HF_RNN_DRY": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.environ.setdefault("HF_RNN_RESULTS", str(HERE.parent / "build" / "gpu_dry"))
    import torch

    if not options.dry and not torch.cuda.is_available():
        print(f"no GPU that torch {torch.__version__} can use (CUDA {torch.version.cuda}); --dry rehearses without one")
        return 1
    return 0 if run_steps(options.steps or list(STEPS)) else 1


if __name__ == "__main__":
    sys.exit(main())
