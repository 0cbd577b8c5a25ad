"""What is a second direction worth, of inputs that are numbers? Handwritten digits, transcribed and classified.

    python benchmarks/digits_ctc.py

Strings: five of scikit-learn's digits side by side with gaps of up to four columns, read column by column, labels by
connectionist temporal classification (`hf_rnn.tasks.DigitStrings`); errors are edits over the length, by the likeliest
label of each column. Rows: one digit, read row by row, classified by the last row's vector or, in both directions, by
the first and the last row's. Two blocks, about 50,000 parameters in one direction and in both. Tested on images not
trained on. AdamW, cosine schedule, a learning rate of 1.28 / width, tuned for none, 3 seeds. One thread a run, as many
at once as there are cores; an interrupted measurement goes on.
"""

import argparse
import statistics
from collections.abc import Iterator

import torch
from driver import save, sized
from models import nearest_width
from resumable import finish, run_all
from tagging import DIRECTIONS, SEEDS, fit
from torch import Tensor
from transformers import PreTrainedModel, set_seed

import hf_rnn
from hf_rnn.tasks import DigitStrings, best_path, digit_rows, error_rate, pad_features

PARAMETERS, BATCH = 50_000, 32
STEPS = sized({"strings": 600, "rows": 300}, {"strings": 600, "rows": 300}, {"strings": 3, "rows": 3})
TESTED = sized(1000, 1000, 4)  # strings
MODELS = {"GRU": "GRU", "LSTM": "LSTM", "minGRU": "MinGRU"}
Batch = dict[str, Tensor]


def make(task: str, name: str, direction: str) -> PreTrainedModel:
    head = "ForCTC" if task == "strings" else "ForSequenceClassification"
    settings = dict(num_input_features=8, num_hidden_layers=2, vocab_size=11, pad_token_id=10, num_labels=10)
    settings |= dict(ctc_loss_reduction="mean", bidirectional=direction == "bidirectional")
    settings |= dict(classifier_pooling="ends" if direction == "bidirectional" else "last")

    def build(size: int) -> PreTrainedModel:
        config = getattr(hf_rnn, f"{MODELS[name]}Config")(hidden_size=size, **settings)
        return getattr(hf_rnn, f"{MODELS[name]}{head}")(config)

    return build(nearest_width(build, PARAMETERS, range(8, 129, 2)))


def strings(seed: int) -> Iterator[Batch]:
    data = DigitStrings(seed=seed)
    for first in range(0, len(data), BATCH):
        yield pad_features([data[n] for n in range(first, first + BATCH)])


def rows(data: Batch, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data["labels"]), (BATCH,), generator=generator)
        yield {name: x[chosen] for name, x in data.items()}


def images(split: str) -> Batch:
    data = digit_rows(split)
    return {name: data[name][:] for name in ("input_features", "labels")}


@torch.no_grad()
def string_errors(model: PreTrainedModel) -> float:
    """Edits over the length of strings of the test's images."""
    tested = DigitStrings("test")
    found, expected = [], []
    for first in range(0, TESTED, 100):
        batch = pad_features([tested[n] for n in range(first, min(first + 100, TESTED))])
        expected += batch.pop("labels").tolist()
        found += best_path(model(**batch).logits, model.config.pad_token_id, batch["attention_mask"])
    return error_rate(found, expected)


@torch.no_grad()
def row_errors(model: PreTrainedModel) -> float:
    """The share of the test's images whose digit is another."""
    tested = images("test")
    return float((model(input_features=tested["input_features"]).logits.argmax(-1) != tested["labels"]).double().mean())


def run(task: str, name: str, direction: str, seed: int) -> dict:
    """Train one and test it."""
    set_seed(seed)
    model = make(task, name, direction).train()
    batches = strings(seed) if task == "strings" else rows(images("train"), seed)
    seconds = fit(model, batches, STEPS[task], 1.28 / model.config.hidden_size)
    return {
        "seed": seed,
        "parameters": model.num_parameters(),
        "width": model.config.hidden_size,
        "seconds": seconds,
        "error": (string_errors if task == "strings" else row_errors)(model.eval()),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cases = [(task, name, direction) for task in STEPS for name in MODELS for direction in DIRECTIONS]
    jobs = {", ".join(map(str, (*case, seed))): (*case, seed) for case in cases for seed in SEEDS}
    runs = run_all("digits_ctc", run, jobs)
    results: dict[str, dict] = {task: {name: {} for name in MODELS} for task in STEPS}
    for task, name, direction in cases:
        found = [runs[f"{task}, {name}, {direction}, {seed}"] for seed in SEEDS]
        results[task][name][direction] = found
        errors = [row["error"] for row in found]
        print(f"{task:8} {name:8} {direction:14} {statistics.mean(errors):.4f} ({max(errors):.4f})")
    save("digits_ctc", results)
    finish("digits_ctc")


if __name__ == "__main__":
    main()
