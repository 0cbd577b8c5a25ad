"""What DMT does to the drift of the student's own memories from the teacher's, at the length trained and at four times
it; and whether a gated student collapses its memory space under SMT.

python benchmarks/memory_drift.py
"""

import argparse
import copy
import dataclasses
import json
from pydoc_data.topics import topics

import numpy as np
import torch
from driver import RESULTS, save
from matplotlib.figure import Figure
from memory_training import Clock, dmt, score, smt, student
from transformers import set_seed

import hf_rnn
from hf_rnn.cli.data import blocks
from hf_rnn.tasks import Retrieval
from hf_rnn_trainers.memory import drift, effective_rank, rollout, teacher_memories
from hf_rnn_trainers.memory.losses import uniformity_loss

LENGTH, FACTOR, ROWS = 32, 4, 256


def rows_of(task, count: int) -> torch.Tensor:
    unseen = dataclasses.replace(task, seed=10**6 + task.seed)
    return torch.stack([unseen[i]["input_ids"] for i in range(count)])[:, :-1]


def measure(model, teacher, x: torch.Tensor, length: int) -> dict:
    """Drift from the teacher of the last `length` tokens, at every fourth step, up to there and beyond."""
    positions = torch.arange(3, x.shape[1], 4)
    curve = drift(model, teacher, x, positions, length)
    inside = positions < length
    return dict(drift=float(curve[inside].mean()), drift_beyond=float(curve[~inside].mean()), curve=curve.tolist())


def retrieval(seed: int, steps: tuple[int, int]) -> dict:
    """SMT stopped early, then DMT. Beyond 32 steps the teacher has forgotten the needle, which the student keeps."""
    task = Retrieval(length=LENGTH, seed=seed)
    far = dataclasses.replace(task, length=FACTOR * LENGTH)
    model = student(task.vocab_size, seed)
    late = dict(labelled_share=0.5, positions_per_sequence=2)
    teacher = smt(model, task, steps[0], Clock(), seed=seed, **late)
    result: dict = {"seed": seed, "steps": steps}
    for name in ("SMT", "DMT"):
        if name == "DMT":
            dmt(model, teacher, dataclasses.replace(task, seed=seed + 1000), steps[1], Clock(), seed=seed)
        accuracies = dict(accuracy=score(model, task), accuracy_beyond=score(model, far))
        result[name] = measure(model, teacher, rows_of(far, ROWS), LENGTH) | accuracies
        show("retrieval", name, result)
    return result


def text(seed: int, steps: tuple[int, int], length: int = 64) -> dict:
    """The same on characters, whose memory of long ago matters little. SMT is stopped in the midst, its learning rate
    as high as ever; then as many steps of DMT, or for comparison more of SMT, with the rate going down."""
    stream = np.frombuffer("\n\n".join(topics.values()).encode(), dtype=np.uint8).astype(np.int32)
    cut = int(0.95 * len(stream))
    rows = blocks(stream[:cut], length + 1)
    held_out = torch.stack([row["input_ids"] for row in list(blocks(stream[cut:], FACTOR * length + 1))[:64]])
    common = dict(seed=seed, per_device_train_batch_size=32, context_size=length)
    model = student(256, seed, tokens=4)
    constant = dict(lr_scheduler_type="constant_with_warmup", lr_scheduler_kwargs=None)
    teacher = smt(model, rows, steps[0], Clock(name=f"text, seed {seed}"), future_size=32, **common, **constant)
    result: dict = {"seed": seed, "steps": steps}
    start, taught = model, teacher
    for name in ("SMT", "DMT", "more SMT"):
        model, teacher = copy.deepcopy(start), copy.deepcopy(taught)
        down = dict(seed=seed + 1, warmup_steps=0, learning_rate=2e-3)
        if name == "DMT":
            dmt(model, teacher, rows, steps[1], Clock(), **common | down)
        elif name == "more SMT":
            smt(model, rows, steps[1], Clock(), teacher, future_size=32, **common | down)
        with torch.no_grad():
            logits = model(held_out).logits[:, :-1]
        right = (logits.argmax(-1) == held_out[:, 1:]).float().mean(0)
        accuracies = dict(accuracy=float(right[:length].mean()), accuracy_beyond=float(right[length:].mean()))
        result[name] = measure(model, teacher, held_out[:, :-1], length) | accuracies
        show("text", name, result)
    return result


def show(task: str, name: str, result: dict) -> None:
    shown = {key: round(value, 4) for key, value in result[name].items() if key != "curve"}
    print(f"{task}, seed {result['seed']} {name:20} {shown}", flush=True)


def gated(seed: int, steps: int) -> dict:
    """A GRU of this package, its state as it is, and the memory RNN with the GRU updater."""
    task = Retrieval(length=LENGTH, seed=seed)
    set_seed(seed)
    sizes = dict(hidden_size=64, num_hidden_layers=2, conv_kernel=0, feed_forward_factor=0)
    sizes |= dict(block_layout="paper", initializer_range=0.02)
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    models = {
        "GRU": hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(vocab_size=task.vocab_size, **sizes, **tokens)),
        "memory RNN, gru": student(task.vocab_size, seed, "gru"),
        "memory RNN, mlp": student(task.vocab_size, seed, "mlp"),
    }
    results, x = {}, rows_of(task, ROWS)
    for name, model in models.items():
        teacher = smt(model, task, steps, Clock(name=f"{name}, seed {seed}"), seed=seed, labelled_share=0.5)
        last = torch.tensor([LENGTH - 1])
        taught, own = teacher_memories(model, teacher, x, last, LENGTH)[:, 0], rollout(model, x)[:, -1].detach()
        results[name] = dict(
            accuracy=score(model, task),
            channels=taught[0].numel(),
            teacher_uniformity=float(uniformity_loss(taught)),
            own_uniformity=float(uniformity_loss(own)),
            teacher_rank=effective_rank(taught),
            own_rank=effective_rank(own),
        )
        print(f"seed {seed} {name:20} { {k: round(v, 3) for k, v in results[name].items()} }", flush=True)
    return results


def draw(results: dict, path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, task, length in zip(axes, ("retrieval", "text"), (LENGTH, 64), strict=True):
        runs = results[task]
        for name, color in (("SMT", "C3"), ("DMT", "C0"), ("more SMT", "C2")):
            for run in runs:
                if name in run:
                    curve = run[name]["curve"]
                    ax.plot(range(3, 4 * len(curve), 4), curve, color=color, label=name if run is runs[0] else None)
        ax.axvline(length - 1, color="grey", linestyle=":")
        ax.set(title=task, xlabel="step of the rollout", ylabel=f"drift from a teacher of the last {length} tokens")
        ax.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["text", "gated", "retrieval"])
    parts, path = parser.parse_args().parts, RESULTS / "memory_drift_cpu.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for part in parts:
        if part == "retrieval":
            results[part] = [retrieval(seed, (350, 100)) for seed in range(3)]
        elif part == "text":
            results[part] = [text(seed, (250, 200)) for seed in range(3)]
        else:
            results[part] = [gated(seed, 500) for seed in range(1)]
        save("memory_drift", results)
    if {"retrieval", "text"} <= set(results):
        draw(results, RESULTS / "memory_drift_cpu.png")


if __name__ == "__main__":
    main()
