"""What does the rate term save where there is much to spare? Models of five million parameters, fine-tuned on two small
tasks: normally, with a small and a larger rate, with a rate on the difference to the pretrained weights, and by LoRA.

    python benchmarks/pretrained_rate.py [--seeds 0 1 2]

The models are those of `pretrained.py`, to be run before; the tasks those of `fine_tuned.py`. All get the same steps.
Each fine-tune is measured in float32; in 8 bits (integers, a scale for each row); coded at the largest relative error
of its matrices at which accuracy is at most half a point below that of the normal fine-tune of the same seed in float32
(by bisection over `ERRORS`), and below its own; the former of the coded difference to the pretrained model, too (LoRA:
of its coded adapter); and pruned by magnitude. Bits are of all that is stored, headers, tables and vectors in float32
included, for each parameter of the whole model. A later call keeps the rows that are there, of other seeds, too, in
results/pretrained_rate_cpu.partial.json.
"""

import argparse
import copy
from typing import Any

import torch
from driver import save
from fine_tuned import TASKS, data, fit, measure
from pretrained import FOLDER
from resumable import read_partial, run_all
from torch import nn

from hf_rnn import compress, prune

# The multipliers of the rate, tried on seed 0 (docs/log.md, 2026-12-01): a class leaves more to spare than a text
SHRINK = {"which module": 2.0, "one module": 0.3}
METHODS = ("normal", "rate", "rate of the difference", "LoRA", "small rate")
ERRORS = (0.06, 0.1, 0.14, 0.2, 0.28, 0.4, 0.6)  # of the weights
DIFFERENCES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)  # of a difference or an adapter
RATIOS, ALLOWED = (0.5, 0.8, 0.9), 0.005
ADAPTERS = r"^(?!.*(lora_|modules_to_save))"  # all but those


def settings(name: str, task: str, method: str) -> dict[str, Any]:
    """What `fit` is told."""
    shrink = SHRINK[task]
    return {
        "normal": {},
        "small rate": dict(rate_shrink=shrink / 10),
        "rate": dict(rate_shrink=shrink),
        "rate of the difference": dict(rate_shrink=0.1, rate_base=str(FOLDER / name)),
        "LoRA": dict(lora=True),
    }[method]


def coarsest(model: nn.Module, task: str, least: float, errors: tuple = ERRORS, **options: Any) -> dict | None:
    """The model coded at the largest of the relative errors that leaves it at least so accurate; None: no one does."""
    found, low, high = None, -1, len(errors)
    while high - low > 1:
        middle = (low + high) // 2
        coded: Any = copy.deepcopy(model)
        report = compress(coded, max_error=errors[middle], **options)
        now = measure(coded, task)
        if now["accuracy"] >= least:
            stored = report.bytes if "exclude" not in options else sum(x.numel() for x in report.payloads.values())
            found, low = now | dict(error=errors[middle], bytes=stored), middle
        else:
            high = middle
    return found


@torch.no_grad()
def eight_bits(model: nn.Module) -> float:
    """Rounds every matrix to 255 levels, a scale for each row, in place; bits a parameter."""
    total = 0
    for p in model.parameters():
        total += 8 * p.numel() + 32 * len(p) if p.dim() > 1 else 32 * p.numel()
        if p.dim() > 1:
            scale = p.flatten(1).abs().amax(1).clamp(min=1e-30).view(-1, *[1] * (p.dim() - 1)) / 127
            p.copy_((p / scale).round() * scale)
    return total / sum(p.numel() for p in model.parameters())


def run(name: str, task: str, method: str, seed: int, accuracy: float | None) -> dict:
    """One fine-tune and all that is measured of it; `accuracy` of the normal one, None where it is that."""
    torch.set_num_threads(1)
    model, logged = fit(name, task, seed, **settings(name, task, method))
    adapted = None
    if method == "LoRA":
        adapted, model = copy.deepcopy(model), model.merge_and_unload()
    count, rows = sum(p.numel() for p in model.parameters()), data(task)[0][::3]
    float32 = measure(model, task)
    least = (float32["accuracy"] if accuracy is None else accuracy) - ALLOWED

    def coded(model: Any, **options: Any) -> dict | None:
        found = coarsest(model, task, least, **options)
        return found and found | dict(bits=8 * found["bytes"] / count)

    found = dict(float32=float32, training=measure(model, task, rows["input_ids"], rows["labels"]), logged=logged)
    rounded = copy.deepcopy(model)
    found["eight bits"] = dict(bits=eight_bits(rounded)) | measure(rounded, task)
    found["coded"] = coded(model)
    if accuracy is not None:  # the same at half a point below its own accuracy
        least = float32["accuracy"] - ALLOWED
        found["coded, own accuracy"] = coded(model)
        least = accuracy - ALLOWED
    found["difference"] = (
        coded(model, errors=DIFFERENCES, base=FOLDER / name)
        if adapted is None
        else coded(adapted, errors=DIFFERENCES, exclude=ADAPTERS)
    )
    found["pruned"] = {}
    for ratio in RATIOS:
        smaller = copy.deepcopy(model)
        prune(smaller, ratio)
        found["pruned"][str(ratio)] = measure(smaller, task)
    line = {part: found[part] and round(found[part]["bits"], 3) for part in ("coded", "difference")}  # type: ignore
    accuracies = [round(now["accuracy"], 4) for now in (float32, found["training"], *found["pruned"].values())]
    print(name, task, method, seed, line, accuracies, flush=True)
    return found | dict(parameters=count)


def saved(rows: dict[str, dict]) -> dict[str, dict]:
    """How many bits fewer each takes than the normal fine-tune of the same model, task and seed, as a share of them;
    None: one of the two is not as accurate at any error."""
    found: dict[str, dict] = {}
    for key, row in rows.items():
        name, task, _, seed = key.split(", ")
        control = rows[f"{name}, {task}, normal, {seed}"]
        for part in ("coded", "difference"):
            pair = control[part], row[part]
            found.setdefault(key, {})[part] = None if None in pair else 1 - pair[1]["bits"] / pair[0]["bits"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["minGRU"], help="GPT-2 is another")
    parser.add_argument("--methods", nargs="*", default=list(METHODS[1:]), help="beside normal fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    keys = [(name, task, seed) for name in options.models for seed in options.seeds for task in TASKS]
    normal = {f"{n}, {task}, normal, {seed}": (n, task, "normal", seed, None) for n, task, seed in keys}
    rows = run_all("pretrained_rate", run, normal)
    others = {
        f"{n}, {task}, {m}, {seed}": (n, task, m, seed, rows[f"{n}, {task}, normal, {seed}"]["float32"]["accuracy"])
        for n, task, seed in keys
        for m in options.methods
    }
    run_all("pretrained_rate", run, others)
    rows = read_partial("pretrained_rate")["runs"]  # those of earlier calls, too
    save("pretrained_rate", dict(rows=rows, saved=saved(rows)))


if __name__ == "__main__":
    main()
