"""What each cell of the xLSTM is for: state tracking and recall, within and beyond the length of training.

    python benchmarks/state_tracking.py

xLSTM (arXiv 2405.04517) of two "neurips" blocks: sLSTM alone, mLSTM alone, the one before the other; LSTM, GRU and
minGRU of two gated blocks, minGRU also in the paper's and followed by attention over the last 64 tokens, with as many
channels as come closest to the parameters of one of each; a Transformer and, with one seed, Mamba from
transformers, as large. Three tasks:

parity: is the number of ones so far odd? A regular language, one bit of state (Delétang et al., arXiv 2207.02098).
    Trained at every position of 2 to 40 bits; the score is of the last position, chance 1/2.
recall: multi-query associative recall (Arora et al., arXiv 2312.04927). Pairs of a key and a value, keys distinct, then
    every key again in another order, each to be answered with its value. Trained with 2 to 16 pairs, scored at the
    queries; who guesses is right in 1 of 64, or of the values it saw, in 1 of as many as there are pairs. Longer here
    is more pairs: more to hold at once, up to 4 times, when every key is one.
selective copying: four of eight symbols among blanks, to be said in order at the end (arXiv 2312.00752), trained up to
    32 tokens. Chance is 1/8; the commonest symbol of a row is right about 0.4 of the time.

New data in every batch, of a random size; the largest grows from 4 to full over the first half of the steps. The same
data, steps and schedule for all; the learning rate is each one's better of two for the task after half of the steps,
with another seed and other strings, the larger where they are level; Mamba's, which takes minutes a run, is 0.01. After
50 batches in a row without an error in the second half a run stops. One thread a run, as many at once as there are
cores; an interrupted measurement goes on run by run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from driver import RESULTS, save
from resumable import finish, run_all
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel, set_seed

import hf_rnn
from hf_rnn.tasks import SelectiveCopying

KEYS, VALUES = 64, 64
SIZES = {"parity": 40, "recall": 16, "selective copying": 32}  # the largest of training
SMALLEST = {"parity": 2, "recall": 2, "selective copying": 8}
FACTORS = {  # times that in the tests
    "parity": [0.25, 0.5, 1, 2, 4, 8, 16],
    "recall": [0.25, 0.5, 1, 2, 3, 4],
    "selective copying": [0.25, 0.5, 1, 2, 4, 8, 16],
}
BATCH, RATES, WARMUP, PATIENCE = 64, (3e-3, 1e-2), 50, 50
LEVEL = 0.05  # of accuracy: less says nothing about a rate


def parity(batch: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (batch, size)."""
    bits = torch.randint(2, (batch, size), generator=generator)
    return bits, bits.cumsum(1) % 2


def recall(batch: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (batch, 3 * size); labels are -100 but at the queries."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :size]
    values = torch.randint(VALUES, (batch, size), generator=generator)
    order = torch.rand(batch, size, generator=generator).argsort(1)
    pairs = torch.stack([keys, KEYS + values], 2).flatten(1)
    tokens = torch.cat([pairs, keys.gather(1, order)], 1)
    return tokens, torch.cat([torch.full_like(pairs, -100), values.gather(1, order)], 1)


def selective_copying(batch: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and labels, (batch, size); labels are -100 but for the last four."""
    task = SelectiveCopying(length=size)
    seed = int(torch.randint(2**62, (), generator=generator))
    rows = [task.row(np.random.default_rng([seed, row])) for row in range(batch)]
    tokens, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    return tokens.long(), labels.long()


TASKS = {"parity": parity, "recall": recall, "selective copying": selective_copying}
VOCABULARIES = {"parity": 2, "recall": KEYS + VALUES, "selective copying": SelectiveCopying(length=32).vocab_size}


def xlstm(slstm_at: list[int] | str, **common) -> PreTrainedModel:
    config = hf_rnn.XLSTMConfig(block_layout="neurips", slstm_at=slstm_at, **common)
    return hf_rnn.XLSTMForCausalLM(config)


def reference(name: str, settings: dict | None = None, **common) -> PreTrainedModel:
    """One of our others as large as `xlstm([0])`, by its channels."""

    def build(channels: int) -> PreTrainedModel:
        sizes = dict(expansion_factor=channels / common["hidden_size"], feed_forward_factor=0)
        config = getattr(hf_rnn, f"{name}Config")(**common | sizes | (settings or {}))
        return getattr(hf_rnn, f"{name}ForCausalLM")(config)

    return _as_large(build, range(16, 257, 8), common)


HYBRID = dict(layer_types=["linear_attention", "sliding_attention"], sliding_window=64)


def mamba(**common) -> PreTrainedModel:
    rest = {name: value for name, value in common.items() if name != "hidden_size"}
    return _as_large(
        lambda width: MambaForCausalLM(MambaConfig(hidden_size=width, use_mambapy=True, **rest)), range(16, 257), common
    )


def transformer(**common) -> PreTrainedModel:
    rest = {name: value for name, value in common.items() if name != "hidden_size"}

    def build(inner: int) -> PreTrainedModel:
        return LlamaForCausalLM(LlamaConfig(hidden_size=56, intermediate_size=inner, num_attention_heads=4, **rest))

    return _as_large(build, range(16, 513), common)


def _as_large(build: Callable[[int], PreTrainedModel], sizes: range, common: dict) -> PreTrainedModel:
    with torch.device("meta"):
        target = xlstm([0], **common).num_parameters()
        size = min(sizes, key=lambda n: abs(build(n).num_parameters() - target))
    return build(size)


CONTESTANTS: dict[str, Callable[..., PreTrainedModel]] = {
    "sLSTM, sLSTM": partial(xlstm, "all"),
    "mLSTM, mLSTM": partial(xlstm, []),
    "sLSTM, mLSTM": partial(xlstm, [0]),
    "LSTM, LSTM": partial(reference, "LSTM"),
    "minGRU, minGRU": partial(reference, "MinGRU"),
    "GRU, GRU": partial(reference, "GRU"),
    "minGRU, minGRU, the paper's": partial(reference, "MinGRU", dict(block_layout="paper")),
    "minGRU, attention": partial(reference, "MinGRU", HYBRID),
    "Transformer (transformers)": transformer,
    "Mamba (transformers)": mamba,
}


def train(model: PreTrainedModel, task: str, steps: int, seed: int, learning_rate: float) -> int:
    """Returns the steps it took."""
    generator, right, size, smallest = torch.Generator().manual_seed(seed), 0, SIZES[task], SMALLEST[task]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / WARMUP, 1 - n / steps))
    for step in range(steps):
        largest = max(smallest, min(size, 4 + (size - 4) * 2 * step // steps))
        drawn = int(torch.randint(smallest, largest + 1, (), generator=generator))
        tokens, labels = TASKS[task](BATCH, drawn, generator)
        logits = model(input_ids=tokens).logits  # labels are of the same position, not of the next as transformers'
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        correct = bool(((logits.argmax(-1) == labels) | (labels == -100)).all())
        right = right + 1 if correct and largest == size else 0
        if right == PATIENCE:
            break
    return step + 1


@torch.no_grad()
def test(model: PreTrainedModel, task: str, size: int, seed: int) -> dict[str, float]:
    """Accuracy over 512 strings of this size: at the last position, and at all that have labels."""
    generator = torch.Generator().manual_seed(seed + size)  # no seed of training
    tokens, labels = TASKS[task](512, size, generator)
    correct = (model(input_ids=tokens, use_cache=False).logits.argmax(-1) == labels).double()
    return {"last": float(correct[:, -1].mean()), "all": float(correct[labels != -100].mean())}


def score(row: dict, task: str, factor: float) -> list[float]:
    """What counts, of every seed."""
    key = "last" if task == "parity" else "all"
    return [run["accuracy"][str(factor)][key] for run in row["runs"] if str(factor) in run["accuracy"]]


def picture(results: dict) -> None:
    """Mean accuracy over size, with the range over seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, (task, rows) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for name, row in rows.items():
            factors = [factor for factor in FACTORS[task] if score(row, task, factor)]
            sizes = [int(SIZES[task] * factor) for factor in factors]
            values = [score(row, task, factor) for factor in factors]
            axes.plot(sizes, [statistics.mean(v) for v in values], marker=".", label=name)
            axes.fill_between(sizes, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
        axes.axvline(SIZES[task], color="gray", linestyle=":")
        axes.set(title=task, xscale="log", ylim=(-0.02, 1.03), ylabel="accuracy")
        axes.set_xlabel({"parity": "bits", "recall": "pairs"}.get(task, "tokens"))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(RESULTS / "state_tracking.png", dpi=80)


def run(task: str, name: str, steps: int, seed: int, learning_rate: float, strings: int = 10**6) -> dict:
    """Train one and test it at every size, on strings of this seed."""
    set_seed(seed)
    tokens = dict(vocab_size=VOCABULARIES[task], pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = CONTESTANTS[name](hidden_size=64, num_hidden_layers=2, **tokens).train()
    start = time.perf_counter()
    done = train(model, task, steps, seed, learning_rate)
    seconds = time.perf_counter() - start
    model.eval()
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "steps": done,
        "seconds": seconds,
        "accuracy": {str(factor): test(model, task, int(SIZES[task] * factor), strings) for factor in FACTORS[task]},
        "parameters": model.num_parameters(),
    }


def measure(jobs: dict[tuple, tuple]) -> dict[tuple, dict]:
    return dict(
        zip(jobs, run_all("state_tracking", run, {", ".join(k): v for k, v in jobs.items()}).values(), strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    trials = measure(
        {
            (task, name, f"learning rate {rate}"): (task, name, options.steps // 2, options.seeds, rate, 2 * 10**6)
            for task in TASKS
            for name in CONTESTANTS
            for rate in RATES
            if "Mamba" not in name
        }
    )

    def best(task: str, name: str) -> float:
        if "Mamba" in name:
            return RATES[-1]

        low, high = (score({"runs": [trials[task, name, f"learning rate {rate}"]]}, task, 1)[0] for rate in RATES)
        return RATES[0] if low > high + LEVEL else RATES[1]

    runs = measure(
        {
            (task, name, f"seed {seed}"): (task, name, options.steps, seed, best(task, name))
            for seed in range(options.seeds)
            for task in TASKS
            for name in CONTESTANTS
            if seed == 0 or "Mamba" not in name
        }
    )
    results: dict[str, dict] = {}
    for (task, name, _), result in runs.items():
        row = results.setdefault(task, {}).setdefault(name, {"runs": [], "parameters": result["parameters"]})
        row["runs"].append({key: value for key, value in result.items() if key != "parameters"})
    for task, rows in results.items():
        factors = [factor for factor in FACTORS[task] if factor in (1, 4, 16)]
        print(f"\n{task}, accuracy at multiples of the size of training: mean (worst) of {options.seeds} seeds\n")
        print("| cells | parameters | " + " | ".join(str(SIZES[task] * n) for n in factors) + " | steps |")
        print("| --- " * (len(factors) + 3) + "|")
        for name, row in rows.items():
            values = [score(row, task, factor) for factor in factors]
            cells = " | ".join(f"{statistics.mean(v):.2f} ({min(v):.2f})" if v else "-" for v in values)
            steps = ", ".join(str(run["steps"]) for run in row["runs"])
            print(f"| {name} | {row['parameters']:,} | {cells} | {steps} |")
    picture(results)
    save("state_tracking", results)
    finish("state_tracking")


if __name__ == "__main__":
    main()
