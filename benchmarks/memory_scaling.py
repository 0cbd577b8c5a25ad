"""Time and memory per token of a training step, and how far gradients reach, over the length of sequences.

python benchmarks/memory_scaling.py
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import tempfile
from pathlib import Path
from typing import Any

import torch
from driver import RESULTS, compare, save
from matplotlib.figure import Figure
from memory_training import student
from torch.nn import functional as F

import hf_rnn
from hf_rnn.tasks import Retrieval

LENGTHS, BATCH = (64, 256, 1024), 8


def contestants(length: int) -> tuple[dict, dict]:
    """A training step of each method on the same network, and a count of its sequential evaluations of it."""
    task = Retrieval(length=length)
    items = [task[i] for i in range(BATCH)]
    ids, labels = (torch.stack([item[name] for item in items]) for name in ("input_ids", "labels"))
    runs: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for name, settings in {
        "SMT": dict(),
        "SMT, all positions": dict(all_positions=True, teacher_queries=False),
        "BPTT": None,
    }.items():
        model = student(task.vocab_size, 0, tokens=4)
        if settings is None:

            def step(model=model):
                model(ids, labels=labels, use_cache=False).loss.backward()
                model.zero_grad()

        else:
            with tempfile.TemporaryDirectory() as folder:
                sizes = dict(context_size=length, future_size=length, teacher_hidden_size=model.config.hidden_size)
                args = hf_rnn.SMTConfig(folder, use_cpu=True, report_to="none", **sizes, **settings)
                trainer = hf_rnn.SMTTrainer(model, args, train_dataset=task)

            def step(trainer=trainer):
                trainer.losses.train()
                trainer.compute_loss(trainer.losses, dict(input_ids=ids, labels=labels)).backward()
                trainer.losses.zero_grad()

        calls = []
        # behind a hook on its weights the updater runs step by step
        layer = model.model.layers[0].mixer.updater.in_proj
        hook = layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        step()
        hook.remove()
        runs[name], counts[name] = step, len(calls)
    return runs, counts


def allocated(run: Any) -> float:
    """Largest sum of tensors alive at once during a run beyond what was there before, in MiB."""
    with tempfile.TemporaryDirectory(), torch.profiler.profile(profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def gradient_norms(length: int, batch: int = 64) -> dict[str, list[float]]:
    """|dL/dm_t| over t. BPTT: of the one late label, through the rollout. SMT: of the loss of the memory at t."""
    task = Retrieval(length=length)
    items = [task[i] for i in range(batch)]
    ids, labels = (torch.stack([item[name] for item in items]) for name in ("input_ids", "labels"))
    model = student(task.vocab_size, 0, tokens=4)
    memory, memories = model.initial_memory(batch), []
    for token in ids[:, :-1].unbind(1):
        memory = model.update_memory(memory, token)
        memory.retain_grad()
        memories.append(memory)
    F.cross_entropy(model.read_memory(memory, ids[:, -2]), labels[:, -1]).backward()
    through_time = [float(m.grad.norm()) for m in memories]
    size = model.config.hidden_size
    teacher = hf_rnn.SMTTeacher.for_student(model, all_positions=True, hidden_size=size, queries=False)
    taught = teacher.encode_all(ids[:, :-1]).detach().requires_grad_()
    before = torch.cat([model.initial_memory(batch)[:, None], taught[:, :-1]], 1)
    predicted = model.update_memory(before.flatten(0, 1), ids[:, :-1].flatten())
    (predicted - taught.flatten(0, 1)).square().mean((1, 2)).unflatten(0, (batch, -1)).mean(0).sum().backward()
    return {"BPTT": through_time, "SMT": taught.grad.square().sum((0, 2, 3)).sqrt().tolist()}


def draw(results: dict, path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    time, memory, gradient = figure.subplots(1, 3)
    for name in results["steps"][str(LENGTHS[0])]:
        rows = [results["steps"][str(length)][name] for length in LENGTHS]
        for axes, key in ((time, "us_per_token"), (memory, "kib_per_token")):
            axes.plot(LENGTHS, [row[key] for row in rows], marker="o", label=name)
    for axes, label in ((time, "microseconds per token"), (memory, "KiB per token at the peak")):
        axes.set(xscale="log", yscale="log", xlabel="T", ylabel=label, xticks=LENGTHS, xticklabels=LENGTHS)
        axes.legend()
    for name, norms in results["gradient_norms"].items():
        gradient.semilogy([max(n, 1e-30) for n in norms], label=name)
    gradient.set(xlabel="t", ylabel="gradient norm of the loss by m_t")
    gradient.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    results: dict[str, Any] = {"batch": BATCH, "steps": {}}
    for length in LENGTHS:
        runs, counts = contestants(length)
        rows = compare(runs, repeats=5 if length < 1024 else 3)
        for name, row in rows.items():
            row["sequential_evaluations"] = counts[name]
            row["us_per_token"] = 1e3 * row["ms"] / (BATCH * length)
            row["kib_per_token"] = 2**10 * allocated(runs[name]) / (BATCH * length)
            print(
                f"T = {length:5} {name:20} {row['ms']:9.1f} ms {row['us_per_token']:8.1f} us and "
                f"{row['kib_per_token']:8.1f} KiB a token, {counts[name]} evaluations one after another"
            )
        results["steps"][str(length)] = rows
    results["gradient_norms"] = gradient_norms(128)
    ends = {name: norms[-2] / norms[0] for name, norms in results["gradient_norms"].items()}
    print("gradient norm at the end over that at the start:", {name: f"{ratio:.3g}" for name, ratio in ends.items()})
    path = save("memory_scaling", results)
    draw(results, RESULTS / path.name.replace(".json", ".png"))


if __name__ == "__main__":
    main()
