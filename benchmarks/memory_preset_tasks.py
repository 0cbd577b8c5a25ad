"""Synthetic tasks by the presets of SMT and DMT, beside the same network through time, truncated without a teacher, and
a transformer of as many parameters: accuracy at the length trained, twice and four times it.

python benchmarks/memory_preset_tasks.py [--tasks Retrieval Parity] [--runs rare dense:8 bptt ...] [--seeds 0 1 2]

24 tokens, 64 rows a step, 400 + 60 steps (parity 150 + 100), a memory of 4 x 64 (retrieval 2 x 64), learning rate
2e-3 for all. Rows that are there already are not run again.
"""

import argparse
import dataclasses
import json
import time
from typing import Any

from driver import RESULTS, save
from memory_presets import train
from memory_training import Clock, bptt, fit, score, student, transformer

from hf_rnn import DMTConfig, DMTTrainer, tasks

PATH = RESULTS / "memory_preset_tasks_cpu.json"
LENGTH, BATCH, RATE = 24, 64, 2e-3
STEPS = {"Parity": (150, 100)}
MEMORY = {"Retrieval": 2}
RUNS = ["rare", "dense:8", "bptt", "alone:8", "transformer"]


def scores(model: Any, task: tasks.SyntheticTask) -> list[float]:
    lengths = [dataclasses.replace(task, length=factor * task.length) for factor in (1, 2, 4)]
    return [score(model, longer, rows=512) for longer in lengths]


def run(name: str, method: str, seed: int) -> dict:
    task, steps = getattr(tasks, name)(length=LENGTH, seed=seed), STEPS.get(name, (400, 60))
    model, (how, _, k) = student(task.vocab_size, seed, tokens=MEMORY.get(name, 4)), method.partition(":")
    start, logged = time.process_time(), {}
    both = dict(seed=seed, per_device_train_batch_size=BATCH)
    settings = dict(max_steps=sum(steps), learning_rate=RATE, warmup_steps=0.1) | both
    if how in ("rare", "dense"):
        smt, dmt = (dict(student_steps=int(k)), dict(readout_steps=int(k))) if k else ({}, {})
        logged = train(how, model, task, steps, smt, dmt, (Clock(), Clock()), **both)
    elif how == "alone":
        fit(DMTTrainer, DMTConfig, model, task, settings | dict(readout_steps=int(k)), Clock(), teacher=False)
    else:
        if how == "transformer":
            model = transformer(task.vocab_size, seed, model.num_parameters())
        bptt(model, task, sum(steps), Clock(), **settings)
    found = dict(task=name, run=method, seed=seed, steps=steps, chance=task.chance)
    found |= dict(cpu_seconds=time.process_time() - start, accuracy=scores(model.eval(), task)) | logged
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=["Retrieval", "Parity"], help="of hf_rnn.tasks")
    parser.add_argument("--runs", nargs="*", default=RUNS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    results = json.loads(PATH.read_text())["results"] if PATH.exists() else {"length": LENGTH, "rows": []}
    rows = results["rows"]
    for seed in options.seeds:
        for name in options.tasks:
            for method in options.runs:
                key = dict(task=name, run=method, seed=seed)
                if not any(key.items() <= row.items() for row in rows):
                    rows.append(run(name, method, seed))
                    save("memory_preset_tasks", results)


if __name__ == "__main__":
    main()
