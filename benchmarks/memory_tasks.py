"""The synthetic tasks at the length trained, twice and four times it: SMT then DMT, BPTT and a transformer, each at the
same number of steps, the recurrent ones the same network.

python benchmarks/memory_tasks.py [--seeds 1] [--tasks Parity Stack ...]
"""

import argparse
import dataclasses
import json

from driver import RESULTS, save
from memory_training import Clock, bptt, dmt, score, smt, student, transformer

from hf_rnn import tasks

LENGTH, STEPS = 24, (400, 80)
TASKS = ["Retrieval", "StringCopy", "Stack", "KeysValues", "ModularArithmetic", "Parity", "SelectiveCopying"]


def scores(model, task) -> list[float]:
    lengths = [dataclasses.replace(task, length=factor * task.length) for factor in (1, 2, 4)]
    return [score(model, longer, rows=512) for longer in lengths]


def compare(name: str, seed: int) -> dict:
    task = getattr(tasks, name)(length=LENGTH, seed=seed)
    shape = dict(tokens=4, size=64)
    result: dict = {"task": name, "seed": seed, "chance": task.chance}
    model, clock = student(task.vocab_size, seed, **shape), Clock(name=f"{name} SMT")
    size = model.num_parameters()
    dense = sum(int(label) != -100 for label in task[0]["labels"]) > 1
    share = 0.0 if dense else 0.25
    teacher = smt(model, task, STEPS[0], clock, seed=seed, labelled_share=share)
    result["SMT"] = scores(model, task)
    fresh = dataclasses.replace(task, seed=seed + 1000)
    dmt(model, teacher, fresh, STEPS[1], clock, seed=seed)
    result["SMT+DMT"], result["SMT+DMT seconds"] = scores(model, task), clock.seconds
    for method, make in (
        ("BPTT", lambda: student(task.vocab_size, seed, **shape)),
        ("transformer", lambda: transformer(task.vocab_size, seed, size)),
    ):
        model, clock = make(), Clock()
        bptt(model, task, sum(STEPS), clock, seed=seed)
        result[method], result[f"{method} seconds"] = scores(model, task), clock.seconds
        result[f"{method} parameters"] = model.num_parameters()
    print(f"{name:20} seed {seed} (chance {task.chance:.3f}), accuracy at 1x, 2x, 4x the length of {LENGTH}")
    for method in ("SMT", "SMT+DMT", "BPTT", "transformer"):
        shown = "  ".join(f"{x:.3f}" for x in result[method])
        print(f"  {method:12} {shown}   {result.get(f'{method} seconds', 0):.0f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    options, path = parser.parse_args(), RESULTS / "memory_tasks_cpu.json"
    rows = json.loads(path.read_text())["results"]["rows"] if path.exists() else []
    for seed in range(options.seeds):
        for name in options.tasks:
            rows = [row for row in rows if (row["task"], row["seed"]) != (name, seed)] + [compare(name, seed)]
            save("memory_tasks", {"length": LENGTH, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()
