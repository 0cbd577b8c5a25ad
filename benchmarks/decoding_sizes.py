"""What does a token cost over the size of the model, in 32, 8 and 4 bits, and beside what a user would pick instead?

    python benchmarks/decoding_sizes.py

One sequence, 16 steps from the state that is there, in turn; the table has a sixteenth. Ours at 1 to 100 million
parameters in float32 and packed into 8 and 4 bits; the time in which `torch.sum` reads the same float32 weights;
transformers' Mamba; and, where llama-cpp-python is installed (by hand: pip compiles it), Mamba of llama.cpp from a GGUF
file with random weights in F32, Q8_0 and Q4_0. Four layers each, a vocabulary of 256, the width a multiple of 64, the
nearest. At 100 million also the other architectures, and what stays resident of a model that was loaded packed, in a
process of its own.
"""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from decoding import Decoder
from driver import DRY, Rows, measure, ratios, sized, table
from llama import is_installed, llama_step
from models import MODELS, width
from resumable import Parts
from torch import Tensor, nn

from hf_rnn import WeightOnlyConfig
from hf_rnn.compression.weight_only import pack_model

SIZES = sized(*2 * [(1_000_000, 5_000_000, 20_000_000, 100_000_000)], dry=(40_000,))
LARGEST, STEPS = SIZES[-1], sized(16, 16, 2)
FORMATS = {32: "F32", 8: "Q8_0", 4: "Q4_0"}
WHOLE_NUMBERS = "it rounds activations to 8 bits and multiplies whole numbers; ours are rounded to 16"
ACCEPTED = {
    "torch.sum of the weights": "reads them and does nothing else",
    **{f"hf_rnn, {bits} bits": "fewer bytes" for bits in (8, 4)},
    "llama.cpp, Mamba, F32": "another architecture; a token of few weights is transformers' and Python's calls",
    **{f"llama.cpp, Mamba, {kind}": WHOLE_NUMBERS for kind in ("Q8_0", "Q4_0")},
}


def reading(model: nn.Module) -> Callable[[], None]:
    weights = [p.detach() for p in model.parameters()]

    def run() -> None:
        for x in weights:
            torch.sum(x)

    return run


def packed(name: str, parameters: int, bits: int) -> nn.Module:
    model = build(name, parameters)
    return model if bits == 32 else pack_model(model, WeightOnlyConfig(bits=bits))


def build(name: str, parameters: int) -> nn.Module:
    torch.manual_seed(0)
    unit = sized(64, 64, 8)
    nearest = max(unit, round(width(name, parameters, 256) / unit) * unit)
    tokens = dict(vocab_size=256, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return MODELS[name](nearest, **tokens).eval()


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    """What is read at each step is in the cache, if it fits."""

    def steps() -> None:
        for _ in range(STEPS):
            run()

    return steps


def step(model: nn.Module) -> Callable[[], list[Tensor]]:
    return Decoder(model, torch.zeros(1, 8, dtype=torch.long))


def formats(name: str, parameters: int) -> dict[str, Callable]:
    """Ours in every format, and reading the weights alone."""
    models = {bits: packed(name, parameters, bits) for bits in FORMATS}
    steps = {f"hf_rnn{'' if bits == 32 else f', {bits} bits'}": step(model) for bits, model in models.items()}
    return steps | {"torch.sum of the weights": reading(models[32])}


def token(name: str, parameters: int, peers: bool) -> Rows:
    contestants = formats(name, parameters)
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            contestants |= {"Mamba (transformers)": step(build("Mamba (transformers)", parameters))}
            for kind in FORMATS.values() if is_installed() and not DRY else ():
                contestants[f"llama.cpp, Mamba, {kind}"] = llama_step(Path(folder), parameters, kind)
        contestants = {name: repeated(run) for name, run in contestants.items()}
        rows = ratios(measure(contestants, repeats=sized(30, 30, 1), seconds=25), "hf_rnn", ACCEPTED)
    for row in rows.values():
        row |= {key: row[key] / STEPS for key in ("ms", "ms_min", "ms_max") if key in row}
    table(f"{name}, a token at {parameters:,} parameters", rows)
    return rows


RESIDENT = """
import gc, sys, psutil, torch, hf_rnn
from transformers import AutoModelForCausalLM
def run(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        state = model(torch.zeros(1, 8, dtype=torch.long)).past_key_values
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=state)
    gc.collect()
    return model
small = run(sys.argv[1])
before = psutil.Process().memory_info().rss
large = run(sys.argv[2])
print(psutil.Process().memory_info().rss - before)
"""


def resident(parameters: int) -> dict[str, dict]:
    """Bytes in memory after loading, and a prompt and a token, beyond those of a small model; and bytes on disk."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for bits in FORMATS:
            for size in (SIZES[0], parameters):
                packed("minGRU", size, bits).save_pretrained(f"{folder}/{bits}/{size}")
            command = [sys.executable, "-c", RESIDENT, f"{folder}/{bits}/{SIZES[0]}", f"{folder}/{bits}/{parameters}"]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            disk = os.path.getsize(f"{folder}/{bits}/{parameters}/model.safetensors")
            found[str(bits)] = {"resident_bytes": int(output.split()[-1]), "file_bytes": disk}
            print(f"{bits} bits: {found[str(bits)]}", flush=True)
            gc.collect()
    return {"resident": found}


def main() -> None:
    parts, results = Parts("decoding_sizes"), {}
    for parameters in SIZES:
        title = f"minGRU, {parameters:,} parameters"
        results[title] = parts.run(title, token, "minGRU", parameters, True)
    for name in [name for name in MODELS if "transformers" not in name and name != "minGRU"]:
        title = f"{name}, {LARGEST:,} parameters"
        results[title] = parts.run(title, token, name, LARGEST, False)
    results = {title: rows for title, rows in results.items() if rows} | (
        parts.run("resident", resident, LARGEST) or {}
    )
    parts.finish(results)


if __name__ == "__main__":
    main()
