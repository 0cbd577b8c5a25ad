"""What do weights of 8 and 4 bits cost in quality? Held-out bits per byte of one trained model per architecture.

    python benchmarks/weight_bits.py --data tinyshakespeare.txt

The models, text and schedule of benchmarks/quality.py: 350,000 parameters, 600 steps, seed 0, each one's learning rate
from its committed results. Each is evaluated in float32, packed into 8 bits (a scale for each row), into 4 bits
(groups of 64 where they divide a row, or the next larger), and coded by `save_compressed` with the steps that raise the
loss on other held-out text by at most 0.5%, plain and kept as packed integers where 8 bits hold them.
"""

import argparse
import copy
import json
import math
import tempfile

import torch
from driver import RESULTS, save
from models import make
from quality import BATCH, PARAMETERS, SEEDS, TIME, VALIDATION, held_out, rate, read, split
from resumable import finish, run_all
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

import hf_rnn
from hf_rnn.compression.weight_only import pack_model

NAMES = ("LSTM", "GRU", "minGRU", "minLSTM", "xLSTM", "xLSTM, neurips", "sLSTM")
STEPS = 600


def train(name: str, learning_rate: float, data: str | None) -> PreTrainedModel:
    training, _, _ = split(read(data))
    set_seed(SEEDS[0])
    model = make(name, PARAMETERS, 256).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    draw = torch.Generator().manual_seed(SEEDS[0])
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(step / STEPS)
        at = torch.randint(len(training) - TIME, (BATCH,), generator=draw)
        ids = torch.stack([training[n : n + TIME] for n in at.tolist()])
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def weight_bits(model: PreTrainedModel) -> float:
    """Bits in memory for each parameter of the plain model, scales included."""
    count = sum(
        x.numel() * x.element_size() for x in {**dict(model.named_parameters()), **dict(model.named_buffers())}.values()
    )
    return 8 * count


def run(name: str, learning_rate: float, data: str | None) -> dict:
    """Train one and evaluate it in every format."""
    _, validation, test = split(read(data))
    model = train(name, learning_rate, data)
    count, results = model.num_parameters(), {"parameters": model.num_parameters(), "learning_rate": learning_rate}

    def evaluate(kind: str, other: PreTrainedModel, bits: float | None = None) -> None:
        bits = weight_bits(other) / count if bits is None else bits
        results[kind] = {"bits_per_byte": held_out(other.eval(), test) / math.log(2), "bits_per_weight": bits}

    evaluate("float32", model)
    for bits in (8, 4):
        config = hf_rnn.WeightOnlyConfig(bits=bits)
        evaluate(f"{bits} bits", pack_model(copy.deepcopy(model), config))
    with tempfile.TemporaryDirectory() as folder:
        coded = copy.deepcopy(model)
        report = hf_rnn.save_compressed(coded, folder, evaluate=lambda: held_out(coded.eval(), validation, VALIDATION))
        evaluate("coded", AutoModelForCausalLM.from_pretrained(folder), 8 * report.bytes / count)
        kept = AutoModelForCausalLM.from_pretrained(folder, quantization_config=hf_rnn.WeightOnlyConfig(bits=8))
        evaluate("coded, kept as 8 bits", kept)
        results["packed_layers"] = len(kept.config.quantization_config.packed)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file; default: CPython's documentation")
    options = parser.parse_args()
    chosen = json.loads((RESULTS / "quality_cpu.json").read_text())["results"]["models"]
    jobs = {name: (name, chosen[name]["learning_rate"], options.data) for name in NAMES}
    rows = run_all("weight_bits", run, jobs)
    for name, row in rows.items():
        print(name, {kind: round(found["bits_per_byte"], 4) for kind, found in row.items() if isinstance(found, dict)})
    save("weight_bits", {"steps": STEPS, "models": rows})
    finish("weight_bits")


if __name__ == "__main__":
    main()
