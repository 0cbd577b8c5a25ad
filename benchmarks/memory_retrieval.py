"""Retrieval with one late label: SMT then DMT beside backpropagation through time, same network, same steps.

python benchmarks/memory_retrieval.py [--parts "same steps" longer] [--seeds 3]
"""

import argparse
import dataclasses
import json

from driver import RESULTS, save
from memory_training import Clock, bptt, dmt, score, smt, student

from hf_rnn.tasks import Retrieval, Stack

STEPS = {32: (600, 100), 64: (800, 150)}  # SMT, DMT
# The one label is rare: half of the memories that have to predict, two a sequence, are those it follows
LATE = dict(labelled_share=0.5, positions_per_sequence=2)


def compare(task, seed: int, updater: str, steps: tuple[int, int], name: str) -> dict:
    """Accuracy after SMT, after DMT, and after as many steps of BPTT; and seconds of training."""
    row = dict(name=name, T=task.length, seed=seed, updater=updater, steps=sum(steps), chance=task.chance)
    model, clock = student(task.vocab_size, seed, updater), Clock(name=name)
    teacher = smt(model, task, steps[0], clock, seed=seed, **LATE)
    row |= dict(smt=score(model, task), smt_seconds=clock.seconds)
    clock = Clock()
    dmt(model, teacher, dataclasses.replace(task, seed=task.seed + 1000), steps[1], clock, seed=seed)
    row |= dict(smt_dmt=score(model, task), dmt_seconds=clock.seconds)
    for rate in (1e-3, 2e-3):  # the better counts
        model, clock = student(task.vocab_size, seed, updater), Clock()
        bptt(model, task, sum(steps), clock, learning_rate=rate, seed=seed)
        found = score(model, task)
        if found >= row.get("bptt", 0):
            row |= dict(bptt=found, bptt_seconds=clock.seconds, bptt_rate=rate)
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def longer(seed: int) -> dict:
    """Trained at T = 32 alone: how far beyond does it go?"""
    task, clock = Retrieval(length=32, seed=seed), Clock()
    model = student(task.vocab_size, seed)
    teacher = smt(model, task, 500, clock, seed=seed, **LATE)
    dmt(model, teacher, dataclasses.replace(task, seed=seed + 1000), 100, clock, seed=seed)
    tasks = [dataclasses.replace(task, length=length) for length in (32, 64, 128, 256, 512, 1024)]
    result = {"seed": seed, "steps": 600, "seconds": clock.seconds}
    result["accuracy"] = {str(task.length): score(model, task, rows=256) for task in tasks}
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=["same steps", "longer"])
    options, path = parser.parse_args(), RESULTS / "memory_retrieval_cpu.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    if "same steps" in options.parts:
        rows = results["same steps"] = []
        for seed in range(options.seeds):
            rows.append(compare(Retrieval(length=32, seed=seed), seed, "mlp", STEPS[32], "retrieval"))
        rows.append(compare(Retrieval(length=64), 0, "mlp", STEPS[64], "retrieval"))
        rows.append(compare(Retrieval(length=32), 0, "gru", STEPS[32], "retrieval, gated"))
        rows.append(compare(Stack(length=32), 0, "mlp", STEPS[32], "stack"))
        save("memory_retrieval", results)
    if "longer" in options.parts:
        results["longer"] = []
        for seed in range(options.seeds):
            results["longer"].append(longer(seed))
            save("memory_retrieval", results)


if __name__ == "__main__":
    main()
