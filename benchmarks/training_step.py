"""How fast is a training step of each architecture at equal parameters, in how much memory, and how does it grow?

    python benchmarks/training_step.py

A million parameters on a CPU, ten and a hundred million on a GPU, forward, backward and AdamW, vocabulary 256, the
default blocks (benchmarks/models.py); 4,096 tokens as 64 sequences of 64, 8 of 512 or one, and one of 8,192. Beside
Mamba and a Transformer of the same size from transformers; Mamba at 64 tokens only, where no CUDA kernel is there. Then
each architecture beside the same by others with the same weights (benchmarks/peers.py), 8 sequences of 512, where
"matrix products alone" are those of minGRU's step and nothing else.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from driver import DEVICE, GPU, LIKE_GPU, compare, measure, ratios, relative_error, sized, table
from models import MODELS, make
from peers import PEERS, pair
from resumable import Parts
from torch import Tensor, nn

PARAMETERS = sized(cpu=(1_000_000,), gpu=(10_000_000, 100_000_000), dry=(40_000,))
SHAPES = sized(
    cpu=[(64, 64), (8, 512), (1, 4096), (1, 8192)],
    gpu=[(64, 512), (8, 4096), (1, 32768)],
    dry=[(2, 5)],
)
PEERS_SHAPE, CHECKED = sized(*2 * [((8, 512), 64)], dry=((2, 5), 4))  # beside peers; tokens of a check
VOCABULARY = 256
OTHERS = [name for name in MODELS if "transformers" in name]
LONGEST_CHECKED = 0 if LIKE_GPU else 4096  # tokens in float64; else the model is checked with 64
TOLERANCE = 3e-2 if GPU else 1e-3
ACCEPTED = {
    "Transformer (transformers)": "another architecture, without a recurrence: it is left behind as sequences grow",
    "torch.nn.LSTM": "the same kernel of oneDNN's, by either way",
}


def training_step(model: nn.Module, ids: Tensor) -> Callable[[], list[Tensor]]:
    """Loss and the embedding's gradient, with an optimizer step that changes nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=GPU):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        grad = model.get_input_embeddings().weight.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach(), grad]

    return step


def expected(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """What `training_step` returns, in float64."""
    double = copy.deepcopy(model).double()
    loss = double(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), double.get_input_embeddings().weight.grad]


def check(model: nn.Module, ids: Tensor) -> float:
    """The larger relative error of what `training_step` returns."""
    pairs = zip(training_step(model, ids)(), expected(model, ids), strict=True)
    return max(relative_error(x, y) for x, y in pairs)


def matrix_products(model: nn.Module, tokens: int) -> Callable[[], None]:
    """Those of a step, forward and both gradients of each linear layer."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(tokens, w.shape[1], device=DEVICE) for w in weights]
    grads = [torch.randn(tokens, w.shape[0], device=DEVICE) for w in weights]

    def run():
        for w, x, g in zip(weights, inputs, grads, strict=True):
            x @ w.T
            g @ w
            g.T @ x

    return run


def architectures(parameters: int, batch: int, time: int) -> dict[str, dict]:
    """Each of ours beside Mamba and the Transformer, all measured in turn; their sizes as `parameters`."""
    results: dict[str, dict] = {"parameters": {}}
    ids = torch.randint(0, VOCABULARY, (batch, time), device=DEVICE)
    contestants, references, checked = {}, {}, {}
    for name in MODELS:
        if "Mamba" in name and time > 64 and not GPU:
            continue
        torch.manual_seed(0)
        model = make(name, parameters, VOCABULARY).to(DEVICE).train()
        results["parameters"][name] = model.num_parameters()
        contestants[name] = training_step(model, ids)
        if ids.numel() <= LONGEST_CHECKED:
            references[name] = expected(model, ids)
        else:
            checked[name] = check(model, ids[:1, :CHECKED])
    rows = measure(contestants, references, TOLERANCE, seconds=6)
    for name, error in checked.items():
        rows[name]["error"] = error
        if not error <= TOLERANCE:
            rows[name] = {"error": error, "refused": f"wrong: relative error {error:.2e} > {TOLERANCE:.0e}"}
    for name in [name for name in rows if name not in OTHERS]:
        trio = {"hf_rnn": rows[name]} | {other: rows[other] for other in OTHERS if other in rows}
        title = f"{name}, {batch} x {time} tokens"
        results[title] = ratios(trio, "hf_rnn", ACCEPTED)
        for row in results[title].values():
            if "ms" in row:
                row["tokens_per_second"] = 1e3 * ids.numel() / row["ms"]
                row["bytes_per_token"] = row["peak_mib"] * 2**20 / ids.numel()
        table(title, results[title])
    return results


def same_architecture(parameters: int, name: str) -> dict[str, dict]:
    """One of ours beside the same by others."""
    peer, (batch, time) = PEERS[name], PEERS_SHAPE
    ids = torch.randint(0, VOCABULARY, (batch, time), device=DEVICE)
    ours, theirs = (model.to(DEVICE).train() for model in pair(name, parameters, VOCABULARY))
    contestants: dict[str, Callable] = {"hf_rnn": training_step(ours, ids), peer: training_step(theirs, ids)}
    if name == "minGRU":
        contestants["matrix products alone"] = matrix_products(ours, ids.numel())
    # minGRU-pytorch's gradients, in log space, are off by nearly 1e-3
    rows = compare(contestants, expected(ours, ids), 5e-2 if GPU else 1e-2, seconds=7, accepted=ACCEPTED)
    table(f"{name}, {ours.num_parameters():,} parameters, {batch} x {time} tokens", rows)
    return {f"{name} and the same of {peer}": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=PARAMETERS)
    options = parser.parse_args()
    parts, results = Parts("training_step"), {}
    for size in options.parameters:
        results[f"{size:,} parameters"] = found = {"parameters": {}}
        for batch, time in SHAPES:
            part = parts.run(f"{size:,} parameters, {batch} x {time}", architectures, size, batch, time)
            if part is not None:
                found |= part | {"parameters": found["parameters"] | part["parameters"]}
        for name in PEERS:
            found |= parts.run(f"{size:,} parameters, {name} by others", same_architecture, size, name) or {}
    parts.finish(results)


if __name__ == "__main__":
    main()
