"""Text by characters and images by pixels: SMT, SMT then DMT, BPTT and truncated BPTT of one network, after equal steps
and after equal seconds of training.

python benchmarks/memory_language.py [--data my.txt]      # default: the documentation inside CPython
"""

import argparse
import copy
import json
from pydoc_data.topics import topics

import numpy as np
import torch
from driver import RESULTS, save
from matplotlib.figure import Figure
from memory_training import Clock, bptt, dmt, smt, student

import hf_rnn
from hf_rnn.cli.data import blocks, read_documents
from hf_rnn.tasks import digits, to_image
from hf_rnn.tasks.evaluation import bits_per_byte

CHUNK = 16  # tokens that truncated BPTT goes back
LEVELS, SIDE = 8, 8
SETTINGS = dict(per_device_train_batch_size=16, lr_scheduler_type="constant_with_warmup", lr_scheduler_kwargs=None)
RATE = 1e-3


class TruncatedTrainer(hf_rnn.RecurrentTrainer):
    """BPTT over `CHUNK` tokens, the state carried on without its graph."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, state, total = inputs["input_ids"], None, 0.0
        for start in range(0, ids.shape[1] - 1, CHUNK):
            piece = ids[:, start : start + CHUNK + 1]
            outputs = model(piece[:, :-1], past_key_values=state, use_cache=True)
            state = outputs.past_key_values.detach()
            losses = torch.nn.functional.cross_entropy(
                outputs.logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum"
            )
            total = total + losses
        loss = total / (ids.shape[0] * (ids.shape[1] - 1))
        return (loss, outputs) if return_outputs else loss


class Probe(Clock):
    """Evaluates after so many steps and after so many seconds, and stops when both are reached."""

    def __init__(self, evaluate, steps: int, seconds: float):
        super().__init__()
        self.evaluate, self.at_steps, self.at_seconds, self.found = evaluate, steps, seconds, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control)
        for name, reached in (("steps", self.steps >= self.at_steps), ("seconds", self.seconds >= self.at_seconds)):
            if reached and name not in self.found:
                self.found[name] = dict(loss=self.evaluate(model), steps=self.steps, seconds=self.seconds)
        control.should_training_stop |= len(self.found) == 2


@torch.no_grad()
def mean_loss(model, rows) -> float:
    """Nats per token of rows from the empty memory."""
    training = model.training
    model.eval()
    ids = torch.stack([row["input_ids"] for row in rows])
    total = sum(float(model(part, labels=part).loss) * len(part) for part in ids.split(64))
    model.train(training)
    return total / len(ids)


def compare(
    name: str, vocab_size: int, data, held_out, steps: tuple[int, int], seed: int, **windows
) -> tuple[dict, dict]:
    """Losses, and the models."""

    def new():
        return student(vocab_size, seed, tokens=4, size=64)

    def evaluate(model):
        return mean_loss(model, held_out)

    result, models = {}, {}
    settings = dict(learning_rate=RATE, seed=seed) | SETTINGS | windows
    model, clock = new(), Clock(name=f"{name} SMT")
    teacher = smt(model, data, steps[0], clock, **settings)
    start, spent = copy.deepcopy((model, teacher)), clock.seconds
    for method in ("SMT", "SMT+DMT"):
        (model, teacher), clock = copy.deepcopy(start), Clock()
        if method == "SMT":
            smt(model, data, steps[1], clock, teacher, **settings | dict(warmup_steps=0))
        else:
            window = {key: value for key, value in windows.items() if key == "context_size"}
            down = dict(learning_rate=RATE / 2, lr_scheduler_type="cosine")
            dmt(model, teacher, data, steps[1], clock, **SETTINGS | dict(seed=seed) | window | down)
        found = dict(loss=evaluate(model), steps=sum(steps), seconds=spent + clock.seconds)
        result[method], models[method] = {"steps": found}, model
        print(f"  {name} {method}", found, flush=True)
    for method, trainer_class in (("BPTT", None), ("truncated BPTT", TruncatedTrainer)):
        model = new()
        probe = Probe(evaluate, sum(steps), spent + clock.seconds)
        bptt(model, data, 10**6, probe, trainer_class, **SETTINGS | dict(learning_rate=RATE, seed=seed))
        result[method], models[method] = probe.found, model
        print(f"  {name} {method}", probe.found, flush=True)
    return result, models


def text(path: str | None, steps: tuple[int, int], seed: int) -> dict:
    document = "\n\n".join(topics.values()) if path is None else "\n".join(read_documents(path))
    stream = np.frombuffer(document.encode(), dtype=np.uint8).astype(np.int32)
    cut = int(0.95 * len(stream))
    data, held_out = blocks(stream[:cut], 65), blocks(stream[cut:], 65)
    windows = dict(context_size=64, future_size=32, positions_per_sequence=8)
    result, models = compare(f"text, seed {seed}", 259, data, list(held_out)[:128], steps, seed, **windows)
    tail = torch.from_numpy(stream[cut : cut + 8192])
    for name, model in models.items():
        result[name]["bits_per_byte_as_one_stream"] = bits_per_byte(model, tail, len(tail) - 1)
    return result


def pixels(steps: tuple[int, int], seed: int) -> tuple[dict, dict]:
    data, held_out = digits("train", LEVELS), list(digits("test", LEVELS))
    result, models = compare(f"pixels, seed {seed}", LEVELS + 1, data, held_out, steps, seed, positions_per_sequence=8)
    torch.manual_seed(seed)
    samples = {"digits": torch.stack([row["input_ids"] for row in held_out[:10]])}
    for name, model in models.items():
        start = torch.full((10, 1), LEVELS)
        size = SIDE * SIDE
        samples[name] = model.generate(start, do_sample=True, min_new_tokens=size, max_new_tokens=size)
    return result, samples


def draw(samples: dict, path) -> None:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(len(samples), 1)
    for ax, (name, ids) in zip(axes, samples.items(), strict=True):
        ax.imshow(np.concatenate(list(to_image(ids, LEVELS)), 1), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a text file or data set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, default=(400, 100), help="of SMT and of DMT")
    parser.add_argument("--parts", nargs="*", default=["text", "pixels"])
    options, path = parser.parse_args(), RESULTS / "memory_language_cpu.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    results["truncated_to"] = CHUNK
    for part in options.parts:
        results[part] = []
        for seed in range(options.seeds):
            if part == "text":
                results[part].append(text(options.data, tuple(options.steps), seed))
            else:
                found, samples = pixels(tuple(options.steps), seed)
                results[part].append(found)
                if seed == 0:
                    draw(samples, RESULTS / "memory_language_cpu.png")
            save("memory_language", results)


if __name__ == "__main__":
    main()
