"""Retrieval with one late label: SMT then DMT beside backpropagation through time, same network, same steps.

python benchmarks/memory_retrieval.py            # about 40 minutes on one core
"""

import argparse
import dataclasses

from driver import save
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


def far(seed: int, lengths: list[int]) -> list[dict]:
    """On from T = 32 to longer rows, each with a share of the batch: the same student and teacher go on learning."""
    rows = []
    model = student(Retrieval().vocab_size, seed)
    teacher, total = None, 0.0
    for length in lengths:
        task, clock = Retrieval(length=length, seed=seed + length), Clock(name=f"T = {length}")
        batch = max(2, min(64, 4096 // length))
        steps = (500, 100) if length == lengths[0] else (150, 60)
        options = dict(per_device_train_batch_size=batch, seed=seed)
        teacher = smt(model, task, steps[0], clock, teacher, **options, **LATE)
        before = score(model, task, rows=256, batch=64)
        dmt(model, teacher, dataclasses.replace(task, seed=task.seed + 1000), steps[1], clock, **options)
        total += clock.seconds
        row = dict(T=length, seed=seed, batch=batch, steps=sum(steps), seconds_so_far=total, smt=before)
        row["smt_dmt"] = score(model, task, rows=256, batch=64)
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        rows.append(compare(Retrieval(length=32, seed=seed), seed, "mlp", STEPS[32], "retrieval"))
        save("memory_retrieval", {"same steps": rows})
    rows.append(compare(Retrieval(length=64), 0, "mlp", STEPS[64], "retrieval"))
    rows.append(compare(Retrieval(length=32), 0, "gru", STEPS[32], "retrieval, gated"))
    rows.append(compare(Stack(length=32), 0, "mlp", STEPS[32], "stack"))
    save("memory_retrieval", {"same steps": rows})
    longer = far(0, [32, 64, 128, 256, 512, 1024])
    save("memory_retrieval", {"same steps": rows, "longer and longer": longer})


if __name__ == "__main__":
    main()
