"""A training step with the exact gradient of a sequence of any length: memory and time over the length.

    python benchmarks/long_sequences.py [memory] [speed]

minGRU and LSTM of a million parameters, one row of bytes, a step of AdamW by `RecurrentTrainer`, each case in a process
of its own: backpropagation through the whole row, until it does not fit; chunked, in pieces of 1,024 tokens, all states
between them kept, and about the square root of their number; `ZOTrainer` with SGD and 4 directions; and a Transformer
of as many parameters with gradient checkpointing. Memory is the process's, at its peak, and what of it was there before
the step. Then whole rows and pieces in turn at 8,192 tokens, in one process.
"""

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from driver import DEVICE, GPU, compare, results_path, save, sized, table
from models import make
from torch import Tensor
from tqdm import tqdm

import hf_rnn

PARAMETERS, CHUNK = sized(1_000_000, 1_000_000, 10_000), sized(1024, 1024, 4)
LENGTHS = sized((2**11, 2**14, 2**17, 2**20), (2**11, 2**14, 2**17, 2**20), (8, 16))
LIMIT = 12 * 2**30  # bytes of data that a process may take
PATIENCE = 600  # seconds a case may take
CASES = {
    **{
        f"{name}, {how}": (name, how)
        for name in ("minGRU", "LSTM")
        for how in ("full", "chunked", "chunked, fewer states", "zero-order")
    },
    "Transformer, checkpointing": ("Transformer (transformers)", "checkpointing"),
}


def make_step(name: str, how: str, length: int):
    """A function that makes one training step, optimizer included."""
    torch.manual_seed(0)
    model = make(name, PARAMETERS, 256)
    ids = torch.randint(0, 256, (1, length), device=DEVICE)
    folder = tempfile.mkdtemp()
    common = dict(output_dir=folder, report_to="none", use_cpu=not GPU, max_steps=1)
    if how == "zero-order":
        args = hf_rnn.ZOConfig(**common, num_directions=4, replay_log=False)
        trainer = hf_rnn.ZOTrainer(model, args)
    else:
        pieces: dict = dict(backprop="chunked", chunk_size=CHUNK) if how.startswith("chunked") else {}
        if how == "chunked, fewer states":
            pieces["chunk_states"] = max(2, math.isqrt(length // CHUNK))
        args = hf_rnn.RecurrentTrainingArguments(**common, **pieces)
        trainer = hf_rnn.RecurrentTrainer(model, args, train_dataset=[{}])
        if how == "checkpointing":
            model.gradient_checkpointing_enable()
    optimizer = trainer.create_optimizer()
    targets = torch.tensor(length - 1)

    def step() -> list[Tensor]:
        loss = trainer.training_step(trainer.model, dict(input_ids=ids, labels=ids), targets)
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach().float().reshape(1)]

    return step


def resident(field: str) -> float:
    """MiB: VmRSS, now; VmHWM, at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return float("nan")


def case(name: str, how: str, length: int) -> dict:
    """One step after one of a short row, which makes what is made once."""
    make_step(name, how, 2 * CHUNK)()
    step = make_step(name, how, length)
    before = torch.cuda.memory_allocated() / 2**20 if GPU else resident("VmRSS")
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    start = time.perf_counter()
    loss = float(step()[0])
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**20 if GPU else resident("VmHWM")
    return dict(mib=peak, mib_before=before, seconds=seconds, us_per_token=1e6 * seconds / length, loss=loss)


def run(name: str, how: str, length: int) -> dict:
    """In a process of its own."""
    command = [sys.executable, __file__, name, how, str(length)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return {"refused": f"took more than {PATIENCE} s"}
    if result.returncode:
        told = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else f"exit status {result.returncode}"
        memory = "allocate" in told or "MemoryError" in told or result.returncode < 0 or "OutOfMemory" in told
        return {"refused": f"does not fit in {LIMIT >> 30} GiB" if memory else told[:200]}
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(case(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
        return
    parts = sys.argv[1:] or ["memory", "speed"]
    path = results_path("long_sequences")
    before = json.loads(path.read_text()) if path.exists() else {"results": {}}
    results = before["results"]
    earlier = results.pop("at_other_commits", {})
    others = {part: earlier.get(part, before["commit"]) for part in results if part not in parts}
    results |= {"at_other_commits": others} if others else {}
    for part in parts:
        results[part] = {"memory": measure_memory, "speed": measure_speed}[part]()
        save("long_sequences", results)


def measure_memory() -> dict:
    rows: dict[str, dict] = {}
    for title, (name, how) in tqdm(CASES.items(), desc="cases", disable=None):
        rows[title] = {}
        for length in LENGTHS:
            row = rows[title][str(length)] = run(name, how, length)
            said = row.get("refused") or f"{row['mib']:.0f} MiB, {row['us_per_token']:.1f} us a token"
            tqdm.write(f"{title:32} {length:9,} tokens: {said}")
            if "refused" in row:
                break
    return rows


def measure_speed() -> dict:
    length = sized(8192, 8192, 16)
    speed = {}
    for name in ("minGRU", "LSTM"):
        contestants = {how: make_step(name, how, length) for how in ("full", "chunked")}
        speed[name] = compare(contestants, repeats=11, seconds=120)
        table(f"{name}, {length:,} tokens", speed[name])
    return speed


if __name__ == "__main__":
    main()
