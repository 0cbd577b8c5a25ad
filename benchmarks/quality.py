"""What do architectures and layouts learn in the same number of steps, and in the same time? Held-out loss of bytes.

    python benchmarks/quality.py --data tinyshakespeare.txt

Every layout of benchmarks/models.py at equal parameters on 90% of the text, compared on the last 5%, 3 seeds; some at
other sizes, one seed. A batch is 8 windows of 128 bytes. Cosine schedule over the budget, of steps or of seconds of
training; the learning rate is each one's best of three after 250 steps, by the 5% in between, at other sizes times the
ratio of widths, as widths of 64 to 256 want it (docs/log.md). On a CPU every run has one thread, and as many run at
once as there are cores. Without --data: the documentation inside CPython.
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
from models import LAYOUTS, make, width
from resumable import finish, run_all
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, set_seed

PARAMETERS, BATCH, TIME = 350_000, 8, 128
RATES, TRIAL, SEEDS = (1e-3, 3e-3, 1e-2), 250, (0, 1, 2)  # learning rates, and steps to choose one by
WARMUP, LEAST = 0.05, 0.1  # of the budget; of the learning rate, at the end
POINTS, VALIDATION = 10, 64  # of a curve; windows for each
SIZES = {
    100_000: ("minGRU", "minGRU, paper", "GRU", "Transformer (transformers)"),
    1_000_000: ("minGRU", "minGRU, paper", "GRU", "Transformer (transformers)"),
    5_000_000: ("minGRU",),
}
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


def train(
    name: str, seed: int, learning_rate: float, budget: float, unit: str, parameters: int, data: str | None
) -> dict:
    """One run of `budget` steps or seconds; evaluations do not count."""
    training, validation, test = split(read(data))
    set_seed(seed)
    model = make(name, parameters, 256).to(DEVICE).train()
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


def rate_at(name: str, parameters: int, learning_rate: float) -> float:
    """The learning rate at another size than `PARAMETERS`, where it was chosen."""
    return learning_rate * width(name, PARAMETERS, 256) / width(name, parameters, 256)


def line_style(name: str) -> str:
    """Dashed for others, dotted for layouts that are not the default."""
    return "--" if "transformers" in name else ":" if ", " in name else "-"


def picture(results: dict) -> None:
    """Held-out loss over steps and over seconds, mean and range of the seeds, and over parameters."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    *plots, scaling = figure.subplots(1, 3)
    colours: dict[str, str] = {}
    for axes, (unit, key) in zip(plots, (("steps", "step"), ("seconds", "seconds")), strict=True):
        for name, row in results["models"].items():
            curves = [run["curve"] for run in row[unit]]
            x = [statistics.mean(p[key] for p in ps) for ps in zip(*curves, strict=True)]
            losses = [[p["loss"] for p in ps] for ps in zip(*curves, strict=True)]
            line = axes.plot(
                x, [statistics.mean(ys) for ys in losses], line_style(name), color=colours.get(name), label=name
            )[0]
            colours[name] = line.get_color()
            axes.fill_between(x, [min(y) for y in losses], [max(y) for y in losses], alpha=0.1, color=colours[name])
        axes.set(title=f"the same {unit}", xlabel=unit, ylim=(1.5, 3.0))
    for name in {name for rows in results["sizes"].values() for name in rows}:
        rows = [found[name] for found in results["sizes"].values() if name in found]
        rows = sorted([*rows, results["models"][name]["steps"][0]], key=lambda row: row["parameters"])
        x, y = [row["parameters"] for row in rows], [row["test"] for row in rows]
        scaling.plot(x, y, line_style(name), marker=".", color=colours[name])
    scaling.set(title=f"{results['steps']} steps", xlabel="parameters", xscale="log")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="held-out loss, nats a byte")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
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
            (name, "learning rate", lr): (name, SEEDS[-1] + 1, lr, TRIAL, "steps", PARAMETERS)
            for name in sorted(LAYOUTS, key=lambda name: "Mamba" not in name)  # the slow one first
            for lr in RATES
        }
    )
    best: dict[str, float] = {
        name: min(RATES, key=lambda lr: trials[name, "learning rate", lr]["validation"]) for name in LAYOUTS
    }
    budgets = {"seconds": options.seconds, "steps": options.steps}
    runs = measure(
        {
            (name, unit, seed): (name, seed, best[name], budget, unit, PARAMETERS)
            for unit, budget in budgets.items()
            for name in sorted(LAYOUTS, key=lambda name: "Mamba" not in name)
            for seed in SEEDS
        }
    )
    sizes = measure(
        {
            (name, f"{size:,} parameters"): (
                name,
                SEEDS[0],
                rate_at(name, size, best[name]),
                options.steps,
                "steps",
                size,
            )
            for size, names in reversed(SIZES.items())
            for name in names
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
            for name in LAYOUTS
        },
        "sizes": {
            str(size): {name: sizes[name, f"{size:,} parameters"] for name in names} for size, names in SIZES.items()
        },
    }
    save("quality", results)
    picture(results)
    finish("quality")


if __name__ == "__main__":
    main()
