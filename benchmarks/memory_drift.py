"""What DMT does to the drift of the student's own memories from the teacher's, at the length trained and at four times
it; and whether a gated student collapses its memory space under SMT.

python benchmarks/memory_drift.py
"""

import copy
import dataclasses

import torch
from driver import RESULTS, save
from matplotlib.figure import Figure
from memory_training import Clock, dmt, score, smt, student
from transformers import set_seed

import hf_rnn
from hf_rnn.tasks import Retrieval
from hf_rnn_trainers.smt import drift, effective_rank, rollout, teacher_memories
from hf_rnn_trainers.smt.losses import uniformity_loss

LENGTH, FACTOR, ROWS = 32, 4, 256


def rows_of(task, count: int) -> torch.Tensor:
    unseen = dataclasses.replace(task, seed=10**6 + task.seed)
    return torch.stack([unseen[i]["input_ids"] for i in range(count)])[:, :-1]


def measure(model, teacher, task) -> dict:
    """Drift against the teacher of the last LENGTH tokens, at every fourth step; accuracy within that window."""
    far = dataclasses.replace(task, length=FACTOR * task.length)
    x, positions = rows_of(far, ROWS), torch.arange(3, far.length, 4)
    curve = drift(model, teacher, x, positions, task.length)
    inside = positions < task.length
    return dict(
        drift=float(curve[inside].mean()),
        drift_far=float(curve[~inside].mean()),
        accuracy=score(model, task),
        accuracy_far=score(model, far),
        curve=curve.tolist(),
    )


def before_and_after(seed: int, steps: tuple[int, int]) -> dict:
    """SMT stopped early, then DMT on rows of the same length, and on rows FACTOR times as long."""
    task = Retrieval(length=LENGTH, seed=seed)
    model = student(task.vocab_size, seed)
    teacher = smt(model, task, steps[0], Clock(name=f"SMT, seed {seed}"), seed=seed, labelled_share=0.5)
    result = {"seed": seed, "steps": steps, "SMT": measure(model, teacher, task)}
    longer = copy.deepcopy(model)
    fresh = dataclasses.replace(task, seed=seed + 1000)
    dmt(model, teacher, fresh, steps[1], Clock(), seed=seed)
    result["DMT"] = measure(model, teacher, task)
    fresh = dataclasses.replace(fresh, length=FACTOR * LENGTH)
    windows = dict(context_size=LENGTH, label_every=8, per_device_train_batch_size=32)
    dmt(longer, teacher, fresh, steps[1], Clock(), seed=seed, **windows)
    result["DMT on longer rows"] = measure(longer, teacher, task)
    for name in ("SMT", "DMT", "DMT on longer rows"):
        shown = {key: round(value, 4) for key, value in result[name].items() if key != "curve"}
        print(f"seed {seed} {name:20} {shown}", flush=True)
    return result


def gated(seed: int, steps: int) -> dict:
    """A GRU of this package, its state as it is, and the memory RNN with the GRU updater."""
    task = Retrieval(length=LENGTH, seed=seed)
    set_seed(seed)
    sizes = dict(hidden_size=64, num_hidden_layers=2, conv_kernel=0, feed_forward_factor=0)
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


def draw(results: list[dict], path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, color in (("SMT", "C3"), ("DMT", "C0"), ("DMT on longer rows", "C2")):
        for result in results:
            curve = result[name]["curve"]
            axes.plot(range(3, 4 * len(curve), 4), curve, color=color, label=name if result is results[0] else None)
    axes.axvline(LENGTH - 1, color="grey", linestyle=":")
    axes.set(xlabel="step of the rollout", ylabel="drift from a teacher of the last 32 tokens (MSE)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    results = [before_and_after(seed, (500, 100)) for seed in range(3)]
    save("memory_drift", {"drift": results})
    draw(results, RESULTS / "memory_drift_cpu.png")
    save("memory_drift", {"drift": results, "gated": [gated(seed, 500) for seed in range(1)]})


if __name__ == "__main__":
    main()
