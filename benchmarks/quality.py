"""What do the architectures learn in the same number of steps, and in the same time? Held-out loss of text by bytes.

    python benchmarks/quality.py --data tinyshakespeare.txt

Seven architectures at equal parameters (benchmarks/models.py) on 90% of the text, compared on the last 5%, 3 seeds. A
batch is 8 windows of 128 bytes. Cosine schedule over the budget, of steps or of seconds of training; the learning rate
is each architecture's best of three after 250 steps, by the 5% in between. On a CPU every run has one
thread, and as many run at once as there are cores. Without --data: the documentation inside CPython.
"""

import argparse
import hashlib
import math
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from driver import RESULTS, save
from models import MODELS, make
from resumable import finish, run_all
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, set_seed

PARAMETERS, BATCH, TIME = 350_000, 8, 128
RATES, TRIAL, SEEDS = (1e-3, 3e-3, 1e-2), 250, (0, 1, 2)  # learning rates, and steps to choose one by
WARMUP, LEAST = 0.05, 0.1  # of the budget; of the learning rate, at the end
POINTS, VALIDATION = 10, 64  # of a curve; windows for each
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read(path: str | None) -> bytes:
    return Path(path).read_bytes() if path else "\n\n".join(topics.values()).encode()


def split(text: bytes) -> tuple[Tensor, Tensor, Tensor]:
    """90% to train, 5% to choose by, 5% to report."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    training, validation, test = data.tensor_split([int(0.9 * len(data)), int(0.95 * len(data))])
    return training, validation, test


@torch.no_grad()
def held_out(model: PreTrainedModel, data: Tensor, windows: int | None = None) -> float:
    """Nats for each byte but the first of every window, each read alone."""
    rows = data[: len(data) // TIME * TIME].view(-1, TIME)[:windows]
    total = 0.0
    for batch in rows.split(BATCH):
        logits = model.eval()(input_ids=batch.to(DEVICE), use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(DEVICE), reduction="sum"))
    model.train()
    return total / (len(rows) * (TIME - 1))


def rate(progress: float) -> float:
    """The share of the learning rate after so much of the budget."""
    warm = min(1.0, progress / WARMUP)
    return warm * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(name: str, seed: int, learning_rate: float, budget: float, unit: str, data: str | None) -> dict:
    """One run of `budget` steps or seconds; evaluations do not count."""
    training, validation, test = split(read(data))
    set_seed(seed)
    model = make(name, PARAMETERS, 256).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    # Kernels are compiled before the clock runs
    model(input_ids=training[None, :TIME].to(DEVICE), use_cache=False).logits.sum().backward()
    draw = torch.Generator().manual_seed(seed)
    curve, seconds, step = [], 0.0, 0
    while (progress := (step if unit == "steps" else seconds) / budget) < 1:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(progress)
        at = torch.randint(len(training) - TIME, (BATCH,), generator=draw)
        ids = torch.stack([training[n : n + TIME] for n in at.tolist()]).to(DEVICE)
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds, step = seconds + time.perf_counter() - start, step + 1
        if (step if unit == "steps" else seconds) / budget * POINTS >= len(curve) + 1:
            curve.append({"step": step, "seconds": seconds, "loss": held_out(model, validation, VALIDATION)})
    return {
        "parameters": model.num_parameters(),
        "learning_rate": learning_rate,
        "steps": step,
        "seconds": seconds,
        "validation": held_out(model, validation),
        "test": held_out(model, test),
        "curve": curve,
    }


def picture(results: dict) -> None:
    """Held-out loss over steps and over seconds, mean and range of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (unit, title) in zip(
        figure.subplots(1, 2, sharey=True), (("steps", "the same steps"), ("seconds", "the same time")), strict=True
    ):
        for name, row in results["models"].items():
            curves = [run["curve"] for run in row[unit]]
            x = [
                statistics.mean(p["step" if unit == "steps" else "seconds"] for p in ps)
                for ps in zip(*curves, strict=True)
            ]
            losses = [[p["loss"] for p in ps] for ps in zip(*curves, strict=True)]
            line = axes.plot(x, [statistics.mean(ys) for ys in losses], label=name)[0]
            axes.fill_between(x, [min(y) for y in losses], [max(y) for y in losses], alpha=0.15, color=line.get_color())
        axes.set(title=title, xlabel=unit)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="held-out loss, nats a byte", ylim=(None, 3.0))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(RESULTS / f"quality_{'gpu' if torch.cuda.is_available() else 'cpu'}.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file; default: CPython's documentation")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()

    def measure(jobs: dict[tuple, tuple]) -> dict[tuple, dict]:
        named = {", ".join(map(str, key)): (*arguments, options.data) for key, arguments in jobs.items()}
        return dict(zip(jobs, run_all("quality", train, named).values(), strict=True))

    trials = measure(
        {
            (name, "learning rate", lr): (name, SEEDS[-1] + 1, lr, TRIAL, "steps")
            for name in reversed(MODELS)  # the slow ones first
            for lr in RATES
        }
    )
    best: dict[str, float] = {
        name: min(RATES, key=lambda lr: trials[name, "learning rate", lr]["validation"]) for name in MODELS
    }
    runs = measure(
        {
            (name, unit, seed): (name, seed, best[name], budget, unit)
            for name in sorted(MODELS, key=lambda name: "Mamba" not in name)
            for unit, budget in (("steps", options.steps), ("seconds", options.seconds))
            for seed in SEEDS
        }
    )
    text = read(options.data)
    results = {
        "data": {
            "name": Path(options.data).name if options.data else "pydoc_data.topics",
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        },
        "steps": options.steps,
        "seconds": options.seconds,
        "models": {
            name: {
                "parameters": runs[name, "steps", 0]["parameters"],
                "rates": {lr: trials[name, "learning rate", lr]["validation"] for lr in RATES},
                "learning_rate": best[name],
                "mean_test": {
                    unit: statistics.mean(runs[name, unit, seed]["test"] for seed in SEEDS)
                    for unit in ("steps", "seconds")
                },
                **{unit: [runs[name, unit, seed] for seed in SEEDS] for unit in ("steps", "seconds")},
            }
            for name in MODELS
        },
    }
    save("quality", results)
    picture(results)
    finish("quality")


if __name__ == "__main__":
    main()
