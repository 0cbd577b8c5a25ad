"""An honest race: CD-RGE against backpropagation through time with SGD and with Adam, each at its best learning rate.

    OMP_NUM_THREADS=1 python benchmarks/zero_order_race.py

An LSTM of one block of width 32. Tasks: overfitting one batch of 4 strings that say the same 8 symbols twice, until the
loss is below 0.1; transduction of 5 symbols (copy, reverse, sort) and addition of two numbers of two digits, in batches
of 16 of 4,096 strings; characters of the documentation inside CPython, held-out loss. For each method learning rates
half a decade apart are tried until the best has worse ones on both sides; then two more seeds. Counted in steps, in
forward passes (a backward pass counts as two), seconds of a CPU, and MiB beyond the start. "19 times fewer steps"
(arXiv 2505.17852) compares steps alone; this shows what they cost.

Then, on a text short enough to be learned by heart, the gap between training and held-out loss over epsilon.
"""

import argparse
import math
import pydoc_data.topics
import tempfile
import threading
import time
from collections.abc import Callable

import matplotlib
import psutil
import torch
from datasets import Dataset
from driver import RESULTS, save
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_rnn import LSTMConfig, LSTMForCausalLM, ZOConfig, ZOTrainer

matplotlib.use("Agg")
DIRECTIONS, EPSILON = 96, 0.03
# name: Trainer, optimizer, first exponents k of the learning rates 10^(k/2)
METHODS = {
    "CD-RGE, SGD": ("sgd", (-2, -1, 0)),
    "CD-RGE, Adam": ("adamw_torch", (-4, -3, -2)),
    "BPTT, SGD": ("sgd", (-1, 0, 1)),
    "BPTT, Adam": ("adamw_torch", (-4, -3, -2)),
}
TASKS = {"overfit": 400, "copy": 200, "reverse": 200, "sort": 200, "add": 200, "text": 150}  # most steps
THRESHOLD = 0.1


def peak_mib(run: Callable) -> float:
    """Resident memory of the process at its peak during a call, beyond what it was before; sampled."""
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return max(0, peak - before) / 2**20


def transduction(task: str, rows: int, seed: int) -> Dataset:
    """Input symbols, a separator, output symbols; labels on the output alone."""
    generator = torch.Generator().manual_seed(seed)
    if task == "add":
        a, b = torch.randint(0, 100, (2, rows), generator=generator)
        digits = [x // 10**k % 10 for x, width in ((a, 2), (b, 2), (a + b, 3)) for k in range(width)]  # lowest first
        source, target = torch.stack(digits[:4], 1), torch.stack(digits[4:], 1)
    else:
        source = torch.randint(0, 10, (rows, 5), generator=generator)
        target = {"copy": source, "reverse": source.flip(1), "sort": source.sort(1)[0]}[task]
    ids = torch.cat([source, torch.full((rows, 1), 10), target], 1)
    labels = ids.clone()
    labels[:, : source.shape[1] + 1] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).with_format("torch")


def text(part: slice, size: int) -> Dataset:
    """Rows of `size` characters, 64 kinds."""
    whole = "".join(pydoc_data.topics.topics.values())[part]
    ids = torch.tensor([min(max(ord(c) - 32, 0), 95) * 64 // 96 for c in whole])
    rows = ids[: len(ids) // size * size].view(-1, size).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def datasets(task: str, seed: int) -> tuple[Dataset, Dataset]:
    if task == "overfit":
        half = torch.randint(0, 16, (4, 8), generator=torch.Generator().manual_seed(seed))
        rows = torch.cat([half, half], 1).tolist()
        data = Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")
        return data, data
    if task == "text":
        return text(slice(0, 200_000), 32), text(slice(200_000, 216_384), 64)
    return transduction(task, 4096, seed), transduction(task, 256, seed + 1000)


class Until(TrainerCallback):
    """Stop below the threshold, or where a run has gone wrong."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 1.0)
        control.should_training_stop |= loss < self.threshold or not loss < 20


def run(task: str, method: str, rate: float, seed: int, epsilon: float = EPSILON, steps: int | None = None, data=None):
    """Train once; what it took and what came out."""
    set_seed(seed)
    training, held_out = data or datasets(task, seed)
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    vocabulary = 64 if "text" in task else 16
    sizes = dict(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, feed_forward_factor=0)
    sizes |= dict(block_layout="paper", initializer_range=0.02)
    model = LSTMForCausalLM(LSTMConfig(**sizes, **tokens))
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            output_dir=folder, max_steps=steps or TASKS[task], learning_rate=rate, optim=METHODS[method][0],
            per_device_train_batch_size=4 if task == "overfit" else 16, lr_scheduler_type="constant", logging_steps=1,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, seed=seed,
            logging_nan_inf_filter=False,
        )  # fmt: skip
        zero_order = method.startswith("CD-RGE")
        if zero_order:
            args = ZOConfig(**settings, num_directions=DIRECTIONS, epsilon=epsilon, replay_log=False)
        else:
            args = TrainingArguments(**settings)
        trainer = (ZOTrainer if zero_order else Trainer)(model, args, train_dataset=training, eval_dataset=held_out)
        trainer.add_callback(Until(THRESHOLD if task == "overfit" else 0.0))
        trainer.remove_callback(next(c for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__))
        taken = {}

        def train():
            start = time.perf_counter()
            try:
                trainer.train()
            except FloatingPointError:
                taken["loss"] = math.inf
            taken["seconds"] = time.perf_counter() - start

        memory = peak_mib(train)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        done = trainer.state.global_step
        loss = taken.get("loss", trainer.evaluate()["eval_loss"])
        training_loss = trainer.evaluate(training)["eval_loss"] if "heart" in task else None
    return {
        "rate": rate, "seed": seed, "steps": done, "forward_passes": done * (2 * DIRECTIONS if zero_order else 3),
        "seconds": taken["seconds"], "mib": memory, "held_out_loss": loss if loss == loss else math.inf,
        "training_loss": training_loss, "reached": bool(losses and losses[-1] < THRESHOLD), "losses": losses,
    }  # fmt: skip


def badness(task: str, row: dict) -> float:
    """What the learning rate is chosen by: steps to the threshold, or the held-out loss."""
    if task == "overfit" and row["reached"]:
        return row["steps"] - 1e6
    return row["held_out_loss"]


def best(task: str, method: str) -> list[dict]:
    """Runs of three seeds at the best learning rate, which is none of the smallest and largest tried."""
    exponents = list(METHODS[method][1])
    tried = {k: run(task, method, 10 ** (k / 2), 0) for k in exponents}
    while True:
        at = min(tried, key=lambda k: badness(task, tried[k]))
        if at == max(tried):
            tried[at + 1] = run(task, method, 10 ** ((at + 1) / 2), 0)
        elif at == min(tried):
            tried[at - 1] = run(task, method, 10 ** ((at - 1) / 2), 0)
        else:
            break
    print(task, method, {f"{10 ** (k / 2):.2g}": round(badness(task, row), 3) for k, row in sorted(tried.items())})
    return [tried[at], *(run(task, method, 10 ** (at / 2), seed) for seed in (1, 2))]


def picture(results: dict, gap: dict) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 6))
    shown = [(task, axis) for task, axis in zip(TASKS, axes.flat, strict=False)]
    for task, axis in shown:
        for method, rows in results[task].items():
            losses = rows[0]["losses"]
            passes = rows[0]["forward_passes"] / len(losses)
            axis.plot([passes * (n + 1) for n in range(len(losses))], losses, label=method)
        axis.set(xscale="log", title=task, xlabel="forward passes", ylabel="training loss")
    axes.flat[0].legend(fontsize=7)
    axis = axes.flat[6]
    axis.plot([float(e) for e in gap], [row["held_out_loss"] for row in gap.values()], "o-", label="held out")
    axis.plot([float(e) for e in gap], [row["training_loss"] for row in gap.values()], "o-", label="training")
    axis.set(xscale="log", title="a short text by heart", xlabel="epsilon", ylabel="loss")
    axis.legend(fontsize=7)
    axes.flat[7].axis("off")
    figure.tight_layout()
    figure.savefig(RESULTS / "zero_order_race_cpu.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    results: dict[str, dict] = {}
    for task in parser.parse_args().tasks:
        results[task] = {}
        for method in METHODS:
            rows = results[task][method] = best(task, method)
            middle = sorted(rows, key=lambda row: badness(task, row))[1]
            print(
                f"{task:8} {method:14} rate {rows[0]['rate']:.2g}: {middle['steps']} steps, {middle['forward_passes']} "
                f"forward passes, {middle['seconds']:.1f} s, {middle['mib']:.0f} MiB, held-out loss "
                f"{middle['held_out_loss']:.3f} ({min(r['held_out_loss'] for r in rows):.3f} to "
                f"{max(r['held_out_loss'] for r in rows):.3f})",
                flush=True,
            )
    short = (text(slice(0, 1024), 32), text(slice(200_000, 204_096), 32))
    gap = {}
    for epsilon in (0.003, 0.01, 0.03, 0.1, 0.2):
        gap[str(epsilon)] = run("text by heart", "CD-RGE, Adam", 0.03, 0, epsilon, 300, short)
        row = gap[str(epsilon)]
        print(
            f"epsilon {epsilon}: training {row['training_loss']:.3f}, held out {row['held_out_loss']:.3f}", flush=True
        )
    gap["backpropagation"] = run("text by heart", "BPTT, Adam", 0.03, 0, steps=300, data=short)
    print("backpropagation", {k: gap["backpropagation"][k] for k in ("training_loss", "held_out_loss")})
    save("zero_order_race", {"tasks": results, "gap": gap})
    picture(results, {epsilon: row for epsilon, row in gap.items() if epsilon != "backpropagation"})


if __name__ == "__main__":
    main()
