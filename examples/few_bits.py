"""A language model in few bits, from training to tokens: trained with a rate term, coded on disk, kept as integers in
memory, read from them for each token. What it costs at each stage is printed.

python examples/few_bits.py [--steps 400]
"""

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, set_seed

import hf_rnn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--output_dir", type=Path, default=Path("few_bits"))
options = parser.parse_args()

# The documentation inside CPython, bytes; the last 64 rows are held out, one half to choose by, one to report
text = np.frombuffer("\n\n".join(topics.values()).encode(), np.uint8).astype(int)
rows = text[: len(text) // 128 * 128].reshape(-1, 128)
training = Dataset.from_dict({"input_ids": rows[:-64], "labels": rows[:-64]})
calibration, held_out = torch.from_numpy(rows[-64:]).split(32)

# 1. Train with the rate: the loss, and what the weights cost
set_seed(0)
model = hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(hidden_size=128, num_hidden_layers=3))
arguments = hf_rnn.RateConstrainedConfig(
    str(options.output_dir / "training"),
    rate_shrink=0.1,
    max_steps=options.steps,
    per_device_train_batch_size=16,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    report_to="none",
    save_strategy="no",
    use_cpu=True,
)
hf_rnn.RateConstrainedTrainer(model, arguments, train_dataset=training).train()
model.eval().save_pretrained(options.output_dir / "float32")


# 2. Code it: each matrix as coarse as half a percent of the loss allows
@torch.no_grad()
def nats(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return float(model.eval()(input_ids=ids, labels=ids).loss)


coded = options.output_dir / "coded"
print(hf_rnn.save_compressed(model, coded, evaluate=lambda: nats(model, calibration)))


# 3. Load it: decoded to floats, or the integers as they are
def stage(name: str, folder: Path, **how: object) -> str:
    """Prints what it costs; returns what the model writes."""
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    prompt = hf_rnn.byte_tokenizer()('The "if" statement', return_tensors="pt")["input_ids"]
    model.generate(prompt, max_new_tokens=8, do_sample=False)  # what is compiled once
    start = time.perf_counter()
    tokens = model.generate(prompt, max_new_tokens=64, do_sample=False)
    seconds = time.perf_counter() - start
    disk = (folder / "model.safetensors").stat().st_size
    memory = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    bits = nats(model, held_out) / np.log(2)
    print(
        f"{name:24} {bits:6.3f} bits a byte {disk:9,} bytes on disk {memory:9,} in memory {64 / seconds:6.0f} tokens/s"
    )
    return hf_rnn.byte_tokenizer().decode(tokens[0])


stage("float32", options.output_dir / "float32")
floats = stage("coded, floats in memory", coded)
integers = stage("coded, integers in memory", coded, quantization_config=hf_rnn.WeightOnlyConfig(bits=8))
print(integers)
print("the same text as from the decoded floats" if integers == floats else f"from the decoded floats:\n{floats}")
