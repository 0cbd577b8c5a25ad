"""xLSTM beside transformers' own, with the same weights: a training step, a prompt, and how they grow.

    python benchmarks/xlstm.py

Vocabulary 256, width 256, 4 layers, 4 heads, batch 4, 512 tokens; growth at batch 1. "Matrix products alone" are all
of ours, the cell's included, by torch. Checked in float64 up to 1,024 tokens, longer against each other.
"""

import copy
from functools import partial

import torch
from driver import DEVICE, compare, sized, table
from peers import xlstm_pair
from resumable import Parts
from torch import nn

from hf_rnn import XLSTMConfig

VOCABULARY, LAYERS, HEADS, BATCH = 256, *sized(*2 * [(4, 4, 4)], dry=(1, 2, 2))
WIDTH, TIME, LENGTHS = sized(*2 * [(256, 512, (512, 1024, 4096, 16384))], dry=(128, 5, (7,)))
KEYS, VALUES, INNER, CHUNK = WIDTH // 2 // HEADS, WIDTH // HEADS, 704, 64


def training_step(model: nn.Module, ids: torch.Tensor):
    model.train()

    def run():
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return [loss.detach(), model.get_input_embeddings().weight.grad.clone()]

    return run


def prompt(model: nn.Module, ids: torch.Tensor):
    def run():
        with torch.no_grad():
            return [model.eval()(ids, use_cache=True).logits]

    return run


def matrix_products(batch: int, time_: int, backward: bool):
    """Every matrix product of a pass, by torch: projections, and the cell's, within chunks and with its states."""
    tokens, chunks = batch * time_, batch * HEADS * -(-time_ // CHUNK)
    shapes = [(2 * (WIDTH // 2 + WIDTH), WIDTH), (2 * HEADS, WIDTH), (WIDTH, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER)]
    weights = [torch.randn(*shape, device=DEVICE) for shape in [*shapes * LAYERS, (VOCABULARY, WIDTH)]]
    inputs = {width: torch.randn(tokens, width, device=DEVICE) for width in {w.shape[1] for w in weights}}
    grads = {width: torch.randn(tokens, width, device=DEVICE) for width in {w.shape[0] for w in weights}}
    q, k = (torch.randn(chunks, CHUNK, KEYS, device=DEVICE) for _ in range(2))
    v, w = torch.randn(chunks, CHUNK, VALUES, device=DEVICE), torch.randn(chunks, CHUNK, CHUNK, device=DEVICE)
    C = torch.randn(chunks, KEYS, VALUES, device=DEVICE)

    def run():
        for weight in weights:
            x = inputs[weight.shape[1]] @ weight.T
            if backward:
                grad = grads[x.shape[1]]
                grad @ weight
                grad.T @ inputs[weight.shape[1]]
        for _ in range(LAYERS):
            q @ k.mT, q @ C, w @ v, k.mT @ v
            if backward:  # once more for scores and states, then each product's two gradients
                q @ k.mT, k.mT @ v
                v @ v.mT, w.mT @ v, w @ k, w.mT @ q, v @ C.mT, q.mT @ v, v @ C.mT, k @ C

    return run


def main() -> None:
    torch.manual_seed(0)
    config = XLSTMConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_heads=HEADS)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    both = dict(zip(("hf_rnn", "transformers"), (model.to(DEVICE) for model in xlstm_pair(config)), strict=True))
    double, parts, results = copy.deepcopy(both["hf_rnn"]).double(), Parts("xlstm"), {}

    def measure(make, batch: int, length: int, title: str, **others) -> dict[str, dict]:
        ids = torch.randint(0, VOCABULARY, (batch, length), device=DEVICE)
        reference = make(double if length <= 1024 else both["hf_rnn"], ids)()
        rows = compare({name: make(model, ids) for name, model in both.items()} | others, reference, 1e-3, seconds=4)
        table(title, rows)
        return rows

    for what, make, length in (
        ("training step", training_step, TIME),
        ("prompt", prompt, TIME),
        ("prompt", prompt, TIME + 63),
    ):
        products = {"matrix products alone": matrix_products(BATCH, length, backward=make is training_step)}
        title = f"{what} of {length}"
        run = partial(measure, make, BATCH, length, f"{title} tokens, batch {BATCH}", **products)
        results[title] = parts.run(title, run) or {}
    for what, make in (("prompt", prompt), ("training step", training_step)):
        results[f"{what} by length"] = by_length = {}
        for length in LENGTHS:
            title = f"{what} of {length} tokens, batch 1"
            by_length[str(length)] = parts.run(title, measure, make, 1, length, title) or {}
    parts.finish(results)


if __name__ == "__main__":
    main()
