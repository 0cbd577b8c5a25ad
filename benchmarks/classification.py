"""What do classifiers learn of long expressions and of pixels read one by one?

    python benchmarks/classification.py

ListOps by the rules of Long Range Arena (arXiv 2011.04006), shorter: 20 to 100 tokens at a depth of 4, new expressions
in every batch, 2,000 others to test on. Digits: scikit-learn's 8 x 8 pixels in 16 grey levels, row by row, four fifths
of them to train on and the rest to test on. Two blocks each, as many parameters as minGRU of width 64 has; the
learning rate is each one's best of three after a third of the steps, on expressions and digits kept for that. AdamW,
cosine schedule, 3 seeds. One thread a run, as many at once as there are cores; an interrupted measurement goes on.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from driver import save
from resumable import finish, run_all
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, set_seed

import hf_rnn
from hf_rnn.tasks import ListOps, digits

EXPRESSIONS = dict(min_length=20, max_length=100, max_depth=4)
RATES, WARMUP, SEEDS, TESTED = (1e-3, 3e-3, 1e-2), 0.05, (0, 1, 2), 2000
LEVELS, DIGITS_PAD = 16, 17
# vocabulary, padding, rows in a batch, steps
TASKS = {"ListOps": (ListOps.vocab_size, ListOps.pad_token_id, 32, 500), "digits": (18, DIGITS_PAD, 32, 400)}
Rows = tuple[Tensor, Tensor]  # input_ids (N, T) and labels (N,)


def _ours(name: str, **settings) -> Callable[..., PreTrainedModel]:
    config, model = getattr(hf_rnn, f"{name}Config"), getattr(hf_rnn, f"{name}ForSequenceClassification")
    return lambda size, **common: model(config(hidden_size=size, **settings, **common))


def _transformer(size: int, **common) -> PreTrainedModel:
    sizes = dict(hidden_size=size, intermediate_size=8 * size // 3, num_attention_heads=4)
    return LlamaForSequenceClassification(LlamaConfig(**sizes, **common))


CONTESTANTS: dict[str, Callable[..., PreTrainedModel]] = {
    "minGRU": _ours("MinGRU"),
    "minLSTM": _ours("MinLSTM"),
    "GRU": _ours("GRU"),
    "xLSTM, sLSTM then mLSTM": _ours("XLSTM", block_layout="neurips", slstm_at=[0]),
    "minGRU, the paper's blocks": _ours("MinGRU", block_layout="paper"),
    "Transformer (transformers)": _transformer,
}


def make(name: str, task: str) -> PreTrainedModel:
    vocabulary, pad, _, _ = TASKS[task]
    common = dict(vocab_size=vocabulary, pad_token_id=pad, bos_token_id=None, eos_token_id=None, num_labels=10)
    common |= dict(num_hidden_layers=2)
    with torch.device("meta"):
        target = CONTESTANTS["minGRU"](64, **common).num_parameters()
        size = min(range(16, 161, 8), key=lambda n: abs(CONTESTANTS[name](n, **common).num_parameters() - target))
    return CONTESTANTS[name](size, **common)


def padded(rows: list[dict], pad: int) -> Rows:
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=pad)
    return ids, torch.stack([row["labels"] for row in rows])


def expressions(seed: int, batch: int) -> Iterator[Rows]:
    data = ListOps(seed=seed, **EXPRESSIONS)
    for first in range(0, len(data), batch):
        yield padded([data[n] for n in range(first, first + batch)], ListOps.pad_token_id)


def images(split: str) -> Rows:
    rows = digits(split, levels=LEVELS, classify=True)
    return rows["input_ids"][:], rows["labels"][:]


def batches(rows: Rows, batch: int, seed: int) -> Iterator[Rows]:
    """Epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(rows[0]), generator=generator).split(batch)[: len(rows[0]) // batch]:
            yield rows[0][chosen], rows[1][chosen]


def data(task: str, seed: int, trial: bool) -> tuple[Iterator[Rows], Rows]:
    """Batches to train on, and rows to test on: in a trial others than those that are reported."""
    _, _, batch, _ = TASKS[task]
    if task == "ListOps":
        tested = ListOps(seed=10**6 + trial, **EXPRESSIONS)
        return expressions(seed, batch), padded([tested[n] for n in range(TESTED)], ListOps.pad_token_id)
    ids, labels = images("train")
    kept = len(ids) // 5 if trial else 0
    return batches((ids[kept:], labels[kept:]), batch, seed), (ids[:kept], labels[:kept]) if trial else images("test")


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: Rows) -> float:
    pad = model.config.pad_token_id
    parts = zip(rows[0].split(100), rows[1].split(100), strict=True)
    right = [model(input_ids=x, attention_mask=(x != pad).long()).logits.argmax(-1) == y for x, y in parts]
    return float(torch.cat(right).double().mean())


def run(task: str, name: str, seed: int, learning_rate: float, trial: bool) -> dict:
    """Train one and test it."""
    set_seed(seed)
    model = make(name, task).train()
    steps = TASKS[task][3] // (3 if trial else 1)
    training, tested = data(task, seed, trial)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (WARMUP * steps)) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule, start = torch.optim.lr_scheduler.LambdaLR(optimizer, rate), time.perf_counter()
    for _ in range(steps):
        ids, labels = next(training)
        mask = (ids != model.config.pad_token_id).long()
        loss = nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "parameters": model.num_parameters(),
        "seconds": seconds,
        "accuracy": accuracy(model.eval(), tested),
    }


def measure(jobs: dict[tuple, tuple]) -> dict[tuple, dict]:
    named = {", ".join(key): arguments for key, arguments in jobs.items()}
    return dict(zip(jobs, run_all("classification", run, named).values(), strict=True))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    trials = measure(
        {
            (task, name, f"learning rate {rate}"): (task, name, len(SEEDS), rate, True)
            for task in TASKS
            for name in CONTESTANTS
            for rate in RATES
        }
    )

    def best(task: str, name: str) -> float:
        return max(RATES, key=lambda rate: trials[task, name, f"learning rate {rate}"]["accuracy"])

    runs = measure(
        {
            (task, name, f"seed {seed}"): (task, name, seed, best(task, name), False)
            for task in TASKS
            for name in CONTESTANTS
            for seed in SEEDS
        }
    )
    results: dict[str, dict] = {task: {} for task in TASKS}
    for (task, name, _), found in runs.items():
        row = results[task].setdefault(name, {"parameters": found["parameters"], "runs": []})
        row["runs"].append({key: value for key, value in found.items() if key != "parameters"})
    for task, rows in results.items():
        print(f"\n{task}: accuracy, mean (worst) of {len(SEEDS)} seeds")
        for name, row in rows.items():
            values = [run["accuracy"] for run in row["runs"]]
            print(f"  {name:30} {row['parameters']:8,} {statistics.mean(values):.3f} ({min(values):.3f})")
    save("classification", results)
    finish("classification")


if __name__ == "__main__":
    main()
