"""What is a second direction worth, byte by byte? Sources of Python's standard library, tagged.

    python benchmarks/tagging.py

Each byte is part of a name, a keyword, a string, a number, a comment, an operator or whitespace
(`hf_rnn.tasks.python_sources`): in one direction, and in both, which have as many parameters and so are narrower. Four
blocks of each architecture, of the default layout (xLSTM's cells are mLSTMs), about a million parameters; Transformers
with rotary positions by transformers, Llama's blocks in one direction and ModernBERT's, all of global attention, in
both. Windows of 256 bytes, each read alone, 8 a step; the learning rate is each one's best of four after a quarter of
the steps, on files of the training split kept for that. AdamW, cosine schedule, 3 seeds; accuracy and F1 on windows of
held-out files. The memory RNN is left out: a step takes it about ten times as long. On a CPU every run has one thread,
and as many run at once as there are cores; an interrupted measurement goes on.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from driver import DEVICE, GPU, RESULTS, save, sized
from models import nearest_width
from quality import rate
from resumable import finish, run_all
from sklearn.metrics import f1_score
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForTokenClassification,
    ModernBertConfig,
    ModernBertForTokenClassification,
    PreTrainedModel,
    set_seed,
)

import hf_rnn
from hf_rnn.tasks import python_sources
from hf_rnn.tasks.sources import LABELS

PARAMETERS, LAYERS = sized((1_000_000, 4), (1_000_000, 4), (20_000, 1))
STEPS, BATCH, TIME, TESTED = sized((160, 8, 256, 512), (2000, 64, 256, 4096), (3, 2, 16, 4))
RATES, SEEDS = (1e-3, 3e-3, 1e-2, 3e-2), (0, 1, 2)
DIRECTIONS = ("causal", "bidirectional")
PICTURED, FILE, LINES = "GRU", "fnmatch.py", slice(16, 56)
COLOURS = ("black", "black", "tab:blue", "tab:green", "tab:red", "tab:gray", "tab:purple")  # of LABELS


def _ours(name: str, size: int, direction: str, **settings) -> PreTrainedModel:
    config = getattr(hf_rnn, f"{name}Config")(
        vocab_size=256,
        hidden_size=size,
        num_hidden_layers=LAYERS,
        num_labels=len(LABELS),
        bidirectional=direction == "bidirectional",
        **settings,
    )
    return getattr(hf_rnn, f"{name}ForTokenClassification")(config)


def _transformer(size: int, direction: str) -> PreTrainedModel:
    sizes = dict(vocab_size=256, hidden_size=size, num_hidden_layers=LAYERS, num_attention_heads=4)
    sizes |= dict(num_labels=len(LABELS), pad_token_id=None, bos_token_id=None, eos_token_id=None)
    if direction == "causal":
        return LlamaForTokenClassification(LlamaConfig(intermediate_size=8 * size // 3, **sizes))
    everywhere = dict(layer_types=["full_attention"] * LAYERS, cls_token_id=None, sep_token_id=None)
    return ModernBertForTokenClassification(ModernBertConfig(intermediate_size=8 * size // 3, **everywhere, **sizes))


CONTESTANTS: dict[str, Callable[..., PreTrainedModel]] = {
    "GRU": partial(_ours, "GRU"),
    "LSTM": partial(_ours, "LSTM"),
    "minGRU": partial(_ours, "MinGRU"),
    "minLSTM": partial(_ours, "MinLSTM"),
    "xLSTM": partial(_ours, "XLSTM", num_heads=4),
    "Transformer (transformers)": _transformer,
}
FOUR_HEADS = ("xLSTM", "Transformer (transformers)")  # of even widths


def make(name: str, direction: str) -> PreTrainedModel:
    build = partial(CONTESTANTS[name], direction=direction)
    return build(nearest_width(build, PARAMETERS, range(8, 401, 8 if name in FOUR_HEADS else 4)))


@cache
def windows(split: str) -> Tensor:
    """Bytes and labels, (N, 2, TIME), of whole windows in the order of their files."""
    rows = python_sources(split, TIME)
    pairs = [torch.stack([row["input_ids"], row["labels"]]) for row in rows if len(row["labels"]) == TIME]
    return torch.stack(pairs)


def data(trial: bool) -> tuple[Tensor, Tensor]:
    """Windows to train on, and some to test on: in a trial of other files than those that are reported."""
    training, tested = windows("train"), windows("test")
    if trial:
        training, tested = training.tensor_split([int(0.9 * len(training))])
    some = torch.randperm(len(tested), generator=torch.Generator().manual_seed(0))[:TESTED]
    return training, tested[some]


def batches(rows: Tensor, seed: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids, labels = rows[torch.randint(len(rows), (BATCH,), generator=generator)].to(DEVICE).unbind(1)
        yield {"input_ids": ids, "labels": labels.contiguous()}


def fit(model: PreTrainedModel, training: Iterator[dict[str, Tensor]], steps: int, learning_rate: float) -> float:
    """Train; returns seconds."""
    optimizer, start = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01), time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate((step + 1) / steps)
        optimizer.zero_grad()
        model(**next(training)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return time.perf_counter() - start


@torch.no_grad()
def labels_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(N, T) bytes to what the model takes them for."""
    return torch.cat([model(input_ids=x.to(DEVICE)).logits.argmax(-1).cpu() for x in ids.split(BATCH)])


@cache
def excerpt() -> tuple[Tensor, Tensor]:
    """Bytes and labels of the file that is pictured, up to the last line shown."""
    row = next(row for row in python_sources("test") if row["path"] == FILE)
    ends = (row["input_ids"] == ord("\n")).nonzero().flatten()
    return row["input_ids"][: ends[LINES.stop - 1] + 1], row["labels"][: ends[LINES.stop - 1] + 1]


def run(name: str, direction: str, seed: int, learning_rate: float, trial: bool) -> dict:
    """Train one and test it."""
    set_seed(seed)
    model = make(name, direction).to(DEVICE).train()
    training, tested = data(trial)
    seconds = fit(model, batches(training, seed), STEPS // 4 if trial else STEPS, learning_rate)
    expected, found = tested[:, 1].flatten(), labels_of(model.eval(), tested[:, 0]).flatten()
    f1 = f1_score(expected, found, labels=range(len(LABELS)), average=None, zero_division=0.0)
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "parameters": model.num_parameters(),
        "width": model.config.hidden_size,
        "seconds": seconds,
        "accuracy": float((found == expected).double().mean()),
        "macro_f1": float(f1.mean()),
        "f1": dict(zip(LABELS, f1.tolist(), strict=True)),
        "excerpt": "".join(map(str, labels_of(model, excerpt()[0][None])[0].tolist())),
    }


def draw(axes, text: str, labels: str, truth: str) -> None:
    """Lines in the colours of their labels, one for each character; what is wrong on red."""
    from matplotlib.patches import Rectangle

    lines, at = text.splitlines(keepends=True), 0
    for number, line in enumerate(lines, -LINES.start):
        for column, character in enumerate(line):
            place, label = at + column, int(labels[at + column])
            if number >= 0 and labels[place] != truth[place]:
                axes.add_patch(Rectangle((column, number), 1, 1, color="lightcoral", linewidth=0))
            if number >= 0 and not character.isspace():
                axes.text(column, number + 0.8, character, color=COLOURS[label], family="monospace", fontsize=6.5)
        at += len(line)
    axes.set(xlim=(-1, 85), ylim=(LINES.stop - LINES.start, 0), xticks=[], yticks=[])


def picture(excerpts: dict[str, str]) -> None:
    """What a file's bytes are, and what a model takes them for in one direction and in both."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ids, labels = excerpt()
    text, truth = bytes(ids.tolist()).decode(), "".join(map(str, labels.tolist()))
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, 3), {"tokenize": truth, **excerpts}.items(), strict=True):
        draw(axes, text, found, truth)
        wrong = sum(a != b for a, b in zip(found, truth, strict=True))
        axes.set_title(title if found == truth else f"{title}: {wrong} of {len(truth):,} bytes wrong", fontsize=9)
    patches = [Patch(color=COLOURS[label], label=LABELS[label]) for label in range(1, len(LABELS))]
    patches.append(Patch(color="lightcoral", label="wrong"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8)
    figure.savefig(RESULTS / f"tagging_{'gpu' if GPU else 'cpu'}.png", dpi=110)


def measure(jobs: dict[tuple, tuple]) -> dict[tuple, dict]:
    named = {", ".join(key): arguments for key, arguments in jobs.items()}
    return dict(zip(jobs, run_all("tagging", run, named).values(), strict=True))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pairs = [(name, direction) for name in CONTESTANTS for direction in DIRECTIONS]
    trials = measure({(*pair, f"learning rate {lr}"): (*pair, len(SEEDS), lr, True) for pair in pairs for lr in RATES})
    best = {
        pair: max(RATES, key=lambda lr, pair=pair: trials[*pair, f"learning rate {lr}"]["accuracy"]) for pair in pairs
    }
    runs = measure({(*pair, f"seed {s}"): (*pair, s, best[pair], False) for s in SEEDS for pair in pairs})
    results: dict[str, dict] = {"steps": STEPS, "models": {name: {} for name in CONTESTANTS}}
    pictured = {f"{PICTURED}, {d}": runs[PICTURED, d, f"seed {SEEDS[0]}"]["excerpt"] for d in DIRECTIONS}
    for name, direction in pairs:
        found = [runs[name, direction, f"seed {seed}"] for seed in SEEDS]
        rows = [{key: value for key, value in row.items() if key != "excerpt"} for row in found]
        results["models"][name][direction] = rows
        means = {key: statistics.mean(row[key] for row in rows) for key in ("accuracy", "macro_f1", "seconds")}
        print(f"{name:28} {direction:14}" + "".join(f"  {key} {value:.4f}" for key, value in means.items()))
    save("tagging", results)
    picture(pictured)
    finish("tagging")


if __name__ == "__main__":
    main()
