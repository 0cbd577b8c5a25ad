"""What does the gated layout cost beside the paper's, at equal parameters?

    python benchmarks/layouts.py

A training step, 8 sequences of 512 tokens and AdamW, and a token for one and for 64 sequences; a million parameters,
four blocks each (benchmarks/models.py). Losses and gradients are checked against each model's own in float64 first,
tokens against a whole pass in float64.
"""

import torch
from decoding import Decoder, check
from driver import DEVICE, measure, ratios, sized, table
from models import make
from resumable import Parts
from training_step import TOLERANCE, VOCABULARY, expected, training_step

PARAMETERS = sized(cpu=1_000_000, gpu=10_000_000, dry=40_000)
SHAPE, BATCHES, PROMPT = sized(*2 * [((8, 512), (1, 64), 128)], dry=((2, 5), (2,), 4))
NAMES = ("LSTM", "GRU", "minGRU", "minLSTM")
PAPER = "hf_rnn, the paper's layout"


def both(name: str) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "hf_rnn": make(name, PARAMETERS, VOCABULARY).to(DEVICE),
        PAPER: make(f"{name}, paper", PARAMETERS, VOCABULARY).to(DEVICE),
    }


def step(name: str) -> dict[str, dict]:
    """A training step of each."""
    models = {layout: model.train() for layout, model in both(name).items()}
    ids = torch.randint(0, VOCABULARY, SHAPE, device=DEVICE)
    steps = {layout: training_step(model, ids) for layout, model in models.items()}
    references = {layout: expected(model, ids) for layout, model in models.items()}
    rows = ratios(measure(steps, references, TOLERANCE, repeats=40, seconds=20), "hf_rnn")
    return _told(f"{name}, a training step of {SHAPE[0]} x {SHAPE[1]} tokens", rows, models)


def token(name: str, batch: int) -> dict[str, dict]:
    """A token of each."""
    models = {layout: model.eval() for layout, model in both(name).items()}
    for layout, model in models.items():
        if (error := check(model)) > 1e-3:
            raise ValueError(f"{name}, {layout}: relative error {error:.2e}")
    zeros = torch.zeros(batch, PROMPT, dtype=torch.long, device=DEVICE)
    steps = {layout: Decoder(model, zeros) for layout, model in models.items()}
    rows = ratios(measure(steps, {}, 0.0, repeats=200, seconds=10), "hf_rnn")
    return _told(f"{name}, a token, batch {batch}", rows, models)


def _told(title: str, rows: dict[str, dict], models: dict[str, torch.nn.Module]) -> dict[str, dict]:
    for layout, model in models.items():
        rows[layout]["parameters"] = model.num_parameters()
    table(title, rows)
    return {title: rows}


def main() -> None:
    parts, results = Parts("layouts"), {}
    for name in NAMES:
        results |= parts.run(f"{name}, training", step, name) or {}
        for batch in BATCHES:
            results |= parts.run(f"{name}, a token, batch {batch}", token, name, batch) or {}
    parts.finish(results)


if __name__ == "__main__":
    main()
