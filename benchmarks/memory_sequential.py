"""Loss over the evaluations of the student that wait for one another, the axis of the paper, and over CPU seconds; the
norms of gradients meanwhile; the memory of a step. Text, rows of 64, as `memory_presets.py text` has it, seed 0.

python benchmarks/memory_sequential.py [--runs bptt dense:8 ...] [--data my.txt]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from driver import RESULTS, peak_bytes, save
from matplotlib.figure import Figure
from memory_language import mean_loss
from memory_presets import PARTS, Clock, data_of, learn, network

from hf_rnn import DMTConfig, DMTTrainer, SMTConfig, SMTTrainer

PATH = RESULTS / "memory_sequential_cpu.json"
RUNS = ["bptt", "dense:8", "dense:1", "alone:8"]
TOKENS, ROWS, STEPS, EVERY, RATE = 64, 16, (200, 50), 25, 2e-3


def evaluations(method: str) -> tuple[int, int]:
    """Of the student, one after another, in the forward pass of a step of SMT and of DMT; without SMT the first alone.
    The backward pass of a method waits as often, but for that of DMT's rollout, which has none."""
    kind, _, k = method.partition(":")
    return {"bptt": (TOKENS, 0), "alone": (TOKENS + int(k or 0), 0), "dense": (int(k or 0), TOKENS + int(k or 0))}[kind]


class Curve(Clock):
    """The student's loss alone after every so many steps, and the norms that Trainer logs."""

    def __init__(self, each: int, held_out: list, found: dict):
        super().__init__()
        self.each, self.held_out, self.found = each, held_out, found

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.process_time()
        super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        found = self.found
        found["cpu"] += time.process_time() - self.begun
        found["sequential"] += self.each
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step % EVERY == 0:
            student = getattr(model, "student", model)
            point = dict(sequential=found["sequential"], cpu=found["cpu"], loss=mean_loss(student, self.held_out))
            found["curve"].append(point)
            print({name: round(value, 2) for name, value in point.items()}, flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "grad_norm" in logs:
            self.found["norms"].append([self.found["sequential"], float(logs["grad_norm"])])


def mib(method: str) -> list[float]:
    """Of tensors at the peak of a step, beyond what was there: of SMT and of DMT, or of the one that there is."""
    kind, _, k = method.partition(":")
    model, ids = network("memory", 259, 0).train(), torch.randint(0, 259, (ROWS, TOKENS + 1))
    with tempfile.TemporaryDirectory() as folder:
        common = dict(output_dir=folder, use_cpu=True, report_to="none")
        trainers: list[Any] = []
        if kind == "dense":
            args = SMTConfig.preset("dense", student_steps=int(k), **common)
            trainers = [SMTTrainer(model, args, train_dataset=[])]
        if kind != "bptt":
            alone = kind == "alone"
            teacher = False if alone else trainers[0].teacher
            args = DMTConfig.preset("dense", **common | dict(readout_steps=int(k)))
            trainers += [DMTTrainer(model, args, teacher=teacher, train_dataset=[])]

        def step(trainer=None):
            losses = model if trainer is None else trainer.losses.train()
            inputs = dict(input_ids=ids, labels=ids)
            loss = model(**inputs).loss if trainer is None else trainer.compute_loss(losses, inputs)
            loss.backward()
            losses.zero_grad()

        found = []
        for trainer in trainers or [None]:
            if trainer is not None:
                trainer.losses = trainer.make_losses()
            step(trainer)
            found.append(peak_bytes(lambda trainer=trainer: step(trainer)) / 2**20)
        return found


def run(method: str, path: str | None) -> dict:
    data, held_out, vocab_size = data_of("text", PARTS["text"], TOKENS, path)
    found: dict[str, Any] = dict(run=method, cpu=0.0, sequential=0, curve=[], norms=[])
    first, second = (Curve(each, held_out[:64], found) for each in evaluations(method))
    learn(method, network("memory", vocab_size, 0), data, STEPS, 0, RATE, ROWS, (first, second), logging_steps=10)
    return found | dict(mib=mib(method))


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    sequential, seconds, norms, memory = figure.subplots(1, 4)
    for row in rows:
        for axes, name in ((sequential, "sequential"), (seconds, "cpu")):
            axes.plot([p[name] for p in row["curve"]], [p["loss"] for p in row["curve"]], marker=".", label=row["run"])
        norms.semilogy(*zip(*row["norms"], strict=True), label=row["run"])
    sequential.set(xscale="log", xlabel="evaluations one after another", ylabel="nats per token, alone")
    seconds.set(xlabel="CPU seconds", ylabel="nats per token, alone")
    norms.set(xscale="log", xlabel="evaluations one after another", ylabel="norm of the student's gradient")
    memory.barh([row["run"] for row in rows], [max(row["mib"]) for row in rows])
    memory.set(xlabel="MiB at the peak of a step")
    sequential.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", default=RUNS)
    parser.add_argument("--data", help="a text file or data set")
    options = parser.parse_args()
    results = json.loads(PATH.read_text())["results"] if PATH.exists() else {"steps": STEPS, "rows": []}
    for method in options.runs:
        rows = [row for row in results["rows"] if row["run"] != method]
        results["rows"] = [*rows, run(method, options.data)]
        save("memory_sequential", results)
    draw(results["rows"], PATH.with_suffix(".png"))


if __name__ == "__main__":
    main()
