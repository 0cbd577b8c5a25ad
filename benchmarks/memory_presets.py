"""Text by the dense presets of SMT and DMT beside backpropagation through time and truncated gradients without a
teacher, equal steps, one network: nats per token of held-out rows from the empty memory, CPU seconds of the process.
And retrieval with one late label by both presets, accuracy.

python benchmarks/memory_presets.py [--data my.txt] [--runs bptt dense:8 ...]   # default: the documentation in CPython
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from driver import RESULTS, save
from memory_language import mean_loss
from memory_training import COMMON, Clock, bptt, fit, score, student

import hf_rnn
from hf_rnn import DMTConfig, DMTTrainer, SMTConfig, SMTTrainer
from hf_rnn.cli.data import blocks, read_documents, tokenize
from hf_rnn.tasks import Retrieval

RUNS = ["bptt", "dense:0", "dense:1", "dense:8", "alone:1", "alone:8", "retrieval:rare", "retrieval:dense"]
ROWS = dict(per_device_train_batch_size=16)


def train(preset: str, model: Any, data: Any, steps: tuple[int, int], smt: dict, dmt: dict, **both: Any) -> None:
    """SMT and DMT by a preset, DMT with the optimizer that SMT leaves."""
    common = {name: COMMON[name] for name in ("report_to", "use_cpu", "disable_tqdm", "dataloader_pin_memory")}
    common |= both | dict(logging_strategy="no")
    with tempfile.TemporaryDirectory() as folder:
        kept = dict(save_strategy="steps", save_steps=steps[0])
        args = SMTConfig.preset(preset, folder, max_steps=steps[0], **smt | kept | common)
        trainer = SMTTrainer(model, args, train_dataset=data)
        trainer.train()
        kept = dict(save_strategy="no", optimizer_from=f"{folder}/checkpoint-{steps[0]}")
        args = DMTConfig.preset(preset, str(Path(folder) / "dmt"), max_steps=steps[1], **dmt | kept | common)
        DMTTrainer(model, args, teacher=trainer.teacher, train_dataset=data).train()


def dense(model: Any, data: Any, k: int, steps: tuple[int, int], seed: int) -> None:
    """With k steps of the student; 0: no label's gradient comes into the updater, which learns from the teacher's
    memories alone, by the paper's coefficients."""
    if k:
        smt, dmt = dict(student_steps=k), dict(readout_steps=k)
    else:
        smt = dict(student_steps=1, coef_student=0.0, coef_dynamics=0.1)
        dmt = dict(readout_steps=0, coef_dynamics=10.0, label_every=4)
    train("dense", model, data, steps, smt, dmt, seed=seed, **ROWS)


def retrieval(preset: str, seed: int, steps: tuple[int, int] = (400, 60)) -> dict:
    """One late label, T = 24, by either preset: accuracy at 1, 2 and 4 times the length."""
    task, start = Retrieval(length=24, seed=seed), time.process_time()
    model = student(task.vocab_size, seed)
    train(preset, model, task, steps, {}, {}, seed=seed, per_device_train_batch_size=64)
    seconds, model = time.process_time() - start, model.eval()
    accuracies = [score(model, dataclasses.replace(task, length=factor * task.length)) for factor in (1, 2, 4)]
    found = dict(run=f"retrieval:{preset}", seed=seed, steps=steps, accuracy=accuracies, cpu_seconds=seconds)
    print(found, flush=True)
    return found


def run(name: str, data: Any, held_out: Any, steps: tuple[int, int], seed: int, rate: float) -> dict:
    model, (method, _, k) = student(259, seed, tokens=4, size=64), name.partition(":")
    if method == "retrieval":
        return retrieval(k, seed)
    start = time.process_time()
    if method == "dense":
        dense(model, data, int(k), steps, seed)
    elif method == "alone":
        settings = dict(max_steps=sum(steps), learning_rate=rate, seed=seed, readout_steps=int(k)) | ROWS
        fit(DMTTrainer, DMTConfig, model, data, settings | dict(warmup_steps=25), Clock(), teacher=False)
    else:
        bptt(model, data, sum(steps), Clock(), learning_rate=rate, seed=seed, warmup_steps=25, **ROWS)
    seconds = time.process_time() - start
    found = dict(run=name, seed=seed, steps=steps, loss=mean_loss(model.eval(), held_out), cpu_seconds=seconds)
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a text file or data set")
    parser.add_argument("--runs", nargs="*", default=RUNS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 50), help="of SMT and of DMT")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="of BPTT and without a teacher")
    options, path = parser.parse_args(), RESULTS / "memory_presets_cpu.json"
    documents = read_documents(options.data, "train", "text") if options.data else ["\n\n".join(topics.values())]
    stream, _ = tokenize(documents, hf_rnn.byte_tokenizer())
    cut = int(0.95 * len(stream))
    data, held_out = (blocks(part, options.length + 1) for part in (stream[:cut], stream[cut:]))
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    rows = results.setdefault("rows", [])
    for seed in options.seeds:
        for name in options.runs:
            rows.append(run(name, data, list(held_out)[:128], tuple(options.steps), seed, options.rate))
            if not name.startswith("retrieval"):
                rows[-1]["text"] = Path(options.data).name if options.data else "pydoc topics"
            save("memory_presets", results)


if __name__ == "__main__":
    main()
