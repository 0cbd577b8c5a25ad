"""How fast are the losses of 64 directions, both signs: many in one forward pass, one by one, or as MeZO does it?

    python benchmarks/zero_order.py

Two blocks of width 256 on a CPU, of 1,024 on a GPU, over batch sizes and lengths. "one after another" is the same
low-rank evaluation, a forward pass for each perturbed copy; "in place, dense" changes the weights by normal noise, back
to the other side and back, three passes of generating it for each direction (MeZO, arXiv 2305.17333); on a GPU also
"inference", a plain forward pass with as many rows. Where B * T is over 2,048, 8 directions instead of 64.
"""

import math
import sys
import tempfile

import matplotlib
import torch
from driver import DEVICE, GPU, LIKE_GPU, RESULTS, compare, sized, table
from resumable import Parts

from hf_rnn import LSTMConfig, LSTMForCausalLM, MinGRUConfig, MinGRUForCausalLM, ZOConfig, ZOTrainer

matplotlib.use("Agg")
MODELS = {"minGRU": (MinGRUConfig, MinGRUForCausalLM), "LSTM": (LSTMConfig, LSTMForCausalLM)}
BATCHES, TIMES = sized(*2 * [((1, 4, 16, 64), (1, 16, 128, 512))], dry=((2,), (3,)))
WIDTH, DIRECTIONS = sized(cpu=(256, 64), gpu=(1024, 64), dry=(16, 2))
WHY = "a batch that fills a forward pass by itself gains nothing from others: ours evaluates its copies singly there"
ACCEPTED = {"one after another": WHY, "in place, dense": WHY}


def in_place(model, inputs, directions: int, epsilon: float) -> None:
    """The losses that MeZO takes, with its three passes over the weights for each direction."""

    def move(seed: int, amount: float) -> None:
        generator = torch.Generator(inputs["input_ids"].device).manual_seed(seed)
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device), alpha=amount)

    with torch.no_grad():
        for j in range(directions):
            move(j, epsilon)
            model(**inputs).loss.item()
            move(j, -2 * epsilon)
            model(**inputs).loss.item()
            move(j, epsilon)


def contestants(model, inputs, directions: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        args = ZOConfig(output_dir=folder, report_to="none", use_cpu=not GPU, num_directions=directions, epsilon=1e-3)
        trainer = ZOTrainer(model, args)
    members = [(j, sign) for j in range(directions) for sign in (1, -1)]

    def together():
        sums, counts = trainer._losses(inputs, 0)
        return [sums / counts]

    def one_by_one():
        sums, counts = torch.cat([trainer._losses_of(inputs, 0, [member]) for member in members], 1)
        return [(sums / counts).view(directions, 2)]

    found = {
        "together": together,
        "one after another": one_by_one,
        "in place, dense": lambda: in_place(model, inputs, directions, 1e-3),
    }
    if LIKE_GPU:
        rows = {name: x.repeat(2 * directions, 1) for name, x in inputs.items()}

        def inference():
            with torch.no_grad():
                for part in range(0, len(rows["input_ids"]), 2**14):
                    model(**{name: x[part : part + 2**14] for name, x in rows.items()})

        found["inference"] = inference
    return found


def picture(results: dict) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(MODELS), figsize=(9, 3.6), sharey=True)
    for axis, name in zip(axes, MODELS, strict=True):
        for batch in BATCHES:
            rows = [results.get(f"{name}, batch {batch}, {time} tokens", {}) for time in TIMES]
            ratios = [row.get("one after another", {}).get("ratio", math.nan) for row in rows]
            axis.plot(TIMES, ratios, "o-", label=f"batch {batch}")
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=name)
    axes[0].set_ylabel("times as fast as one after another")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"zero_order_{'gpu' if GPU else 'cpu'}.png", dpi=120)


def losses(name: str, batch: int, time: int) -> dict[str, dict]:
    config, model_class = MODELS[name]
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, feed_forward_factor=0, block_layout="paper")
    model = model_class(config(**sizes)).eval().to(DEVICE)
    directions = DIRECTIONS if batch * time <= 2048 else 8
    ids = torch.randint(0, 256, (batch, time + 1), device=DEVICE)
    runs = contestants(model, {"input_ids": ids, "labels": ids}, directions)
    title = f"{name}, batch {batch}, {time} tokens"
    reference = runs["one after another"]()
    rows = compare(runs, reference, repeats=5 if batch * time <= 2048 else 3, accepted=ACCEPTED)
    for row in rows.values():
        row["directions"] = directions
    table(title, rows)
    sys.stdout.flush()
    return {title: rows}


def main() -> None:
    parts, results = Parts("zero_order"), {}
    for name in MODELS:
        for batch in BATCHES:
            for time in TIMES:
                results |= parts.run(f"{name}, {batch} x {time}", losses, name, batch, time) or {}
    picture(results)
    parts.finish(results)


if __name__ == "__main__":
    main()
