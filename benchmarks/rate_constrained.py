"""Rate-constrained training against normal training with the same quantiser and coder: a character model on text and a
classifier of images as sequences, three seeds; pruning; the gap between training and held-out loss.

python benchmarks/rate_constrained.py [--parts text "longer text" classes] [--seeds 0 1 2]
"""

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import torch
from datasets import Dataset
from driver import RESULTS, save
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from transformers import set_seed

import hf_rnn
from hf_rnn import RateConstrainedConfig, RateConstrainedTrainer, compress, prune
from hf_rnn.cli.data import blocks

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyshakespeare.txt"
STEPS, ROW, TRAIN, HELD_OUT = {"text": 1500, "longer text": 3000}, 65, 300_000, 26_000
RATES = {"normal": 0.0, "small": 0.03, "middle": 0.08, "large": 0.2}
LONGER = {"normal": 0.0, "small": 0.05, "middle": 0.15, "large": 0.5}  # more steps bear more
EXPONENTS, ROUNDINGS = (-3, -4, -5, -6), (0.0, 0.1, 0.3)
RATIOS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
PAPER = dict(block_layout="paper", initializer_range=0.02)  # as when this was measured


def read_text(path: Path = TEXT) -> np.ndarray:
    """The text as ids of its characters."""
    _, ids = np.unique(np.frombuffer(path.read_bytes(), np.uint8), return_inverse=True)
    return ids.astype(np.int32)


def fit(model: Any, data: Any, seed: int, steps: int, rate_shrink: float, **settings: Any) -> dict:
    """Train; what was logged last."""
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=4e-3,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs=dict(min_lr_rate=0.05),
            warmup_steps=50,
            logging_steps=100,
            seed=seed,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        args = RateConstrainedConfig(**common | settings, rate_shrink=rate_shrink)
        trainer = RateConstrainedTrainer(model, args, train_dataset=data)
        trainer.train()
        return {key: v for key, v in trainer.state.log_history[-2].items() if isinstance(v, float)}


def train(seed: int, steps: int, ids: np.ndarray, rate_shrink: float, **settings: Any) -> tuple[Any, dict]:
    """A character model."""
    set_seed(seed)
    sizes = dict(hidden_size=128, num_hidden_layers=1, feed_forward_factor=0.0, expansion_factor=1.0, **PAPER)
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=int(ids.max()) + 1, **sizes, **TOKENS))
    return model, fit(model, blocks(ids[:TRAIN], ROW), seed, steps, rate_shrink, **settings)


@torch.no_grad()
def mean_loss(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Nats a prediction."""
    model.eval()
    parts = zip(inputs.split(128), labels.split(128), strict=True)
    total = sum(float(model(x, labels=y).loss) * len(x) for x, y in parts)
    model.train()
    return total / len(inputs)


def curve(model: Any, loss: Any) -> list[dict]:
    """Bits and loss of the model quantised with each step and rounding."""
    points = []
    for exponent in EXPONENTS:
        for rate in ROUNDINGS:
            quantised = copy.deepcopy(model)
            ans = compress(quantised, step=2.0**exponent, rate=rate).bits
            golomb = compress(copy.deepcopy(model), step=2.0**exponent, rate=rate, coder="exp_golomb").bits
            points.append(dict(step=exponent, rate=rate, ans=ans, exp_golomb=golomb, loss=loss(quantised)))
    return points


def bits_at(points: list[dict], loss: float, coder: str = "ans") -> float | None:
    """Fewest bits at a loss: along straight lines between points, None where none is as good."""
    found = [p[coder] for p in points if p["loss"] <= loss]
    for a in points:
        for b in points:
            if b["loss"] <= loss < a["loss"] and a[coder] < b[coder]:
                share = (a["loss"] - loss) / (a["loss"] - b["loss"])
                found.append(a[coder] + share * (b[coder] - a[coder]))
    return min(found, default=None)


def pruned(model: Any, loss: Any) -> list[float]:
    losses = []
    for ratio in RATIOS:
        smaller = copy.deepcopy(model)
        losses.append(prune(smaller, ratio, evaluate=lambda smaller=smaller: loss(smaller))["after"])
    return losses


def measure(name: str, model: Any, logged: dict, held_out: Any, seen: Any) -> dict:
    row = dict(name=name, loss=held_out(model), train_loss=seen(model), logged=logged)
    row |= dict(curve=curve(model, held_out), pruned=pruned(model, held_out))
    shown = {key: round(row["logged"].get(key, 0.0), 3) for key in ("rate_shape", "coded_bits", "zeros")}
    print(f"  {name:10} held out {row['loss']:.4f}, training {row['train_loss']:.4f}, {shown}", flush=True)
    return row


def compare(rows: list[dict]) -> dict:
    """Bits of each at the normal model's float32 loss and a share more, and what that saves."""
    normal, found = rows[0], {}
    for share in (0.005, 0.015, 0.03):
        for coder in ("ans", "exp_golomb"):
            loss = normal["loss"] * (1 + share)
            bits = {row["name"]: bits_at(row["curve"], loss, coder) for row in rows}
            own = bits["normal"]
            best = min((b for name, b in bits.items() if name != "normal" and b is not None), default=None)
            saved = None if best is None or own is None else 1 - best / own
            found[f"{coder} at +{share:.1%}"] = dict(bits=bits, saved=saved)
            shown = {name: None if b is None else round(b, 2) for name, b in bits.items()}
            print(f"    {coder:10} at +{share:.1%}: {shown}, saved {saved if saved is None else format(saved, '.0%')}")
    return found


def text(seed: int, steps: int, path: Path) -> dict:
    ids = read_text(path)
    held = torch.from_numpy(ids[TRAIN : TRAIN + HELD_OUT // ROW * ROW].reshape(-1, ROW)).long()
    seen = torch.from_numpy(ids[: HELD_OUT // ROW * ROW].reshape(-1, ROW)).long()
    rows = []
    for name, rate in (RATES if steps == STEPS["text"] else LONGER).items():
        model, logged = train(seed, steps, ids, rate)
        rows.append(
            measure(name, model, logged, lambda m: mean_loss(m, held, held), lambda m: mean_loss(m, seen, seen))
        )
    return dict(seed=seed, parameters=model.num_parameters(), rows=rows, equal_loss=compare(rows))


def classes(seed: int) -> dict:
    """scikit-learn's digits, 64 pixels of 17 levels as tokens."""
    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(found.data).long()[order], torch.from_numpy(found.target).long()[order]
    mask = torch.ones_like(x)
    columns = {"input_ids": x[400:].numpy(), "attention_mask": mask[400:].numpy(), "labels": y[400:].numpy()}
    data = Dataset.from_dict(columns).with_format("torch")

    @torch.no_grad()
    def outputs(m: Any, part: slice) -> Any:
        return m.eval()(x[part], attention_mask=mask[part], labels=y[part])

    rows = []
    for name, rate in RATES.items():
        set_seed(seed)
        sizes = dict(hidden_size=64, num_hidden_layers=1, feed_forward_factor=0.0, expansion_factor=1.0, num_labels=10)
        sizes |= PAPER
        config = hf_rnn.GRUConfig(vocab_size=17, **sizes, **TOKENS | dict(pad_token_id=16))
        model = hf_rnn.GRUForSequenceClassification(config)
        logged = fit(model, data, seed, 500, rate)
        losses = [lambda m, part=part: float(outputs(m, part).loss) for part in (slice(0, 400), slice(400, None))]
        row = measure(name, model, logged, *losses)
        row["accuracy"] = float((outputs(model, slice(0, 400)).logits.argmax(-1) == y[:400]).float().mean())
        rows.append(row)
    return dict(seed=seed, parameters=model.num_parameters(), rows=rows, equal_loss=compare(rows))


def draw(runs: list[dict], path: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    rate, cut = figure.subplots(1, 2)
    for i, name in enumerate(row["name"] for row in runs[0]["rows"]):
        for run in runs:
            row = next((row for row in run["rows"] if row["name"] == name), None)
            if row is None:
                continue
            points = sorted((p["ans"], p["loss"]) for p in row["curve"])
            front = [p for j, p in enumerate(points) if all(p[1] < q[1] for q in points[:j])]
            label = name if run is runs[0] else None
            rate.plot(*zip(*front, strict=True), color=f"C{i}", marker=".", alpha=0.7, label=label)
            cut.plot(RATIOS, row["pruned"], color=f"C{i}", marker=".", alpha=0.7, label=label)
    normal = runs[0]["rows"][0]["loss"]
    rate.set(
        xlabel="bits a weight (ANS, all included)", ylabel="held-out loss, nats", ylim=(normal - 0.08, normal + 0.35)
    )
    cut.set(xlabel="share pruned by magnitude", ylabel="held-out loss, nats", ylim=(normal - 0.08, normal + 1.0))
    for axes in (rate, cut):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["text", "longer text", "classes"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=TEXT, help="a text of 326,000 characters or more")
    parser.add_argument("--without", nargs="*", default=[], help="rates to leave out")
    options, path = parser.parse_args(), RESULTS / "rate_constrained_cpu.json"
    for name in options.without:
        del RATES[name], LONGER[name]
    for part in options.parts:
        for seed in options.seeds:
            print(f"{part}, seed {seed}", flush=True)
            found = text(seed, STEPS[part], options.data) if part in STEPS else classes(seed)
            results = json.loads(path.read_text())["results"] if path.exists() else {}
            results[part] = sorted(
                [run for run in results.get(part, []) if run["seed"] != seed] + [found], key=lambda run: run["seed"]
            )
            save("rate_constrained", results)
    for part, name in (("text", ""), ("longer text", "_longer")):
        if results.get(part):
            draw(results[part], RESULTS / f"rate_constrained{name}_cpu.png")


if __name__ == "__main__":
    main()
