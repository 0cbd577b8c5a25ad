"""From training to tokens: what a model of five million parameters costs at each stage of few bits, beside others.

    python benchmarks/few_bits.py [--methods normal rate]

The minGRU of `pretrained.py`, as it is ("pretrained") or fine-tuned on the text of one module, normally or with the
rate of `pretrained_rate.py`; each in float32, coded by `save_compressed` at the largest relative error that costs at
most half a point of next-byte accuracy, decoded when loaded or kept as integers; the float32 file by ZipNN, which is
lossless and decodes to the same floats; and a Mamba of random weights and equal size in GGUF, by llama.cpp (size,
memory and speed only; its size alone where just the package gguf is there). Each stage is loaded in a process of its
own: bits per byte of held-out text, bytes on disk, resident bytes after 64 tokens beyond those of a small model, and
tokens a second of CPU time, the best of five.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from driver import save
from fine_tuned import fit, load, measure
from llama import write_gguf
from pretrained_rate import ALLOWED, coarsest, settings

from hf_rnn import MinGRUConfig, MinGRUForCausalLM, save_compressed

TASK, TOKENS = "one module", 64
STAGE = """
import gc, json, sys, time
sys.path.insert(0, sys.argv[4])
import torch, hf_rnn
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def run(folder, repeats):
    how = dict(quantization_config=hf_rnn.WeightOnlyConfig(bits=8)) if sys.argv[3] == "integers" else {}
    model, seconds = AutoModelForCausalLM.from_pretrained(folder, **how).eval(), []
    for _ in range(repeats):
        start = time.process_time()
        model.generate(torch.full((1, 8), 65), max_new_tokens=64, do_sample=False)
        seconds.append(time.process_time() - start)
    return model, min(seconds)
small = run(sys.argv[1], 2)
before = resident()
model, seconds = run(sys.argv[2], 5)
memory = resident() - before
from fine_tuned import measure
found = measure(model, "one module")
found = dict(bits_a_byte=found["loss"], accuracy=found["accuracy"])
print(json.dumps(found | dict(memory=memory, tokens_a_second=64 / seconds)))
"""
LLAMA = """
import json, sys, time
sys.path.insert(0, sys.argv[3])
import tempfile, torch
from pathlib import Path
from llama import llama_step
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
with tempfile.TemporaryDirectory() as folder:
    small = llama_step(Path(folder), 100_000, sys.argv[2])
    before = resident()
    step = llama_step(Path(folder), int(sys.argv[1]), sys.argv[2])
    seconds = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(64):
            step()
        seconds.append(time.process_time() - start)
    size = (Path(folder) / f"mamba-{sys.argv[2]}.gguf").stat().st_size
    print(json.dumps(dict(memory=resident() - before, tokens_a_second=64 / min(seconds), file_bytes=size)))
"""


def call(script: str, *arguments: object) -> dict:
    """The JSON that a process of its own prints last."""
    command = [sys.executable, "-c", script, *map(str, arguments), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return json.loads(result.stdout.splitlines()[-1])


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def zipnn_bytes(path: Path) -> int:
    from zipnn import ZipNN

    return len(ZipNN(input_format="byte", bytearray_dtype="float32").compress(bytearray(path.read_bytes())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["normal", "rate"], choices=("pretrained", "normal", "rate"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = MinGRUForCausalLM(MinGRUConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1))
        small.save_pretrained(folder / "small")

        def stage(name: str, where: Path, how: str = "floats") -> None:
            rows[name] = dict(file_bytes=file_bytes(where)) | call(STAGE, folder / "small", where, how)
            print(name, rows[name], flush=True)

        for method in options.methods:
            if method == "pretrained":
                model = load("minGRU", TASK).eval()
            else:
                model, _ = fit("minGRU", TASK, 0, **settings("minGRU", TASK, method))
            model.save_pretrained(folder / method)
            stage(f"{method}, float32", folder / method)
            first = method == options.methods[0]
            if first and importlib.util.find_spec("zipnn"):
                size = zipnn_bytes(folder / method / "model.safetensors")
                rows[f"{method}, ZipNN"] = rows[f"{method}, float32"] | dict(file_bytes=size)
                print("ZipNN", size, flush=True)
            if first:
                least = measure(model, TASK)["accuracy"] - ALLOWED
            found = coarsest(model, TASK, least)
            if found is None:
                print(f"{method}: not as accurate at any error", flush=True)
                continue
            save_compressed(model, folder / f"{method} coded", max_error=found["error"])
            stage(f"{method}, coded, floats in memory", folder / f"{method} coded")
            stage(f"{method}, coded, integers in memory", folder / f"{method} coded", "integers")
        count = model.num_parameters()
    for kind in ("F32", "Q8_0", "Q4_0"):
        name = f"Mamba, llama.cpp, {kind}"
        if importlib.util.find_spec("llama_cpp"):
            rows[name] = call(LLAMA, count, kind)
        elif importlib.util.find_spec("gguf"):  # which writes the format, but runs nothing
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / "mamba.gguf"
                write_gguf(path, count, kind)
                rows[name] = dict(file_bytes=path.stat().st_size)
        print(name, rows.get(name), flush=True)
    save("few_bits", dict(parameters=count, tokens=TOKENS, stages=rows))


if __name__ == "__main__":
    main()
