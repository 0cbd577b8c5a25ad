"""Byte-level models of five million parameters that know Python's standard library, for `pretrained_rate.py`.

    python benchmarks/pretrained.py minGRU --seconds 450 --stop 90
    python benchmarks/pretrained.py minGRU --seconds 150 --stop 105 --go_on

minGRU in the gated layout, four blocks, and transformers' GPT-2, six of width 256, on the sources of the standard
library (`hf_rnn.tasks.python_sources`, training split) and the documentation in `pydoc_data.topics`, but for the
modules that the fine-tuning tasks are made of. Held out: the sources of the test split and the last twentieth of the
documentation. Windows of 256 bytes, 16 a step, AdamW, cosine schedule over seconds of the process's own CPU time, so
that a busy machine changes nothing; one thread, products in bfloat16, weights in float32. Checkpoints go to
`runs/pretrained/`, which git ignores; the log of losses to `results/pretrained_cpu.json`.
"""

import argparse
import json
import math
import os
import time
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
import torch
from driver import results_path, save
from models import make
from quality import rate
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel, set_seed

from hf_rnn.tasks import python_sources

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "pretrained"
TIME, BATCH, POINTS, WINDOWS = 256, 16, 20, 128  # windows held out for a point of the curve
# Modules that only fine-tuning sees: some to tell apart, and the one whose text is learned
LEFT_OUT = (
    "_pydecimal", "argparse", "doctest", "inspect", "ipaddress", "mailbox", "pickletools", "subprocess", "tarfile",
    "typing",
)  # fmt: skip
LEARNED = "turtle"
RATES = {"minGRU": 3e-3, "GPT-2": 1e-3}
PAD = 0  # a byte that no source has


def build(name: str) -> PreTrainedModel:
    """With random weights."""
    if name == "minGRU":
        model = make(name, 5_000_000, 256)
    else:
        sizes = dict(n_embd=256, n_layer=6, n_head=4, n_positions=TIME, vocab_size=256)
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=None, eos_token_id=None))
    model.config.pad_token_id = PAD
    return model


@cache
def files() -> dict[str, dict[str, np.ndarray]]:
    """Bytes of each file by split and path; kept in a file, since tagging them takes a while."""
    path = FOLDER / "sources.pt"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        rows = {
            split: {r["path"]: r["input_ids"].numpy().astype(np.uint8) for r in python_sources(split)}
            for split in ("train", "test")
        }
        torch.save(rows, path)
    return torch.load(path, weights_only=False)


def module(name: str) -> np.ndarray:
    """Bytes of one module."""
    return next(rows[f"{name}.py"] for rows in files().values() if f"{name}.py" in rows)


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and held out."""
    left_out = {f"{name}.py" for name in (*LEFT_OUT, LEARNED)}
    parts = {
        split: np.concatenate([ids for path, ids in rows.items() if path not in left_out])
        for split, rows in files().items()
    }
    text = np.frombuffer("\n\n".join(topics.values()).encode(), np.uint8)
    cut = len(text) * 19 // 20
    pairs = (parts["train"], text[:cut]), (parts["test"], text[cut:])
    return tuple(torch.from_numpy(np.concatenate(pair)) for pair in pairs)  # type: ignore[return-value]


@torch.no_grad()
def held_out(model: PreTrainedModel, data: Tensor, windows: int | None = None) -> float:
    """Bits a byte, but the first of each window; `windows` of them, spread over the data."""
    rows = data[: len(data) // TIME * TIME].view(-1, TIME)
    rows = rows if windows is None else rows[:: max(1, len(rows) // windows)][:windows]
    model.eval()
    total = 0.0
    for x in rows.long().split(BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=x, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten(), reduction="sum"))
    model.train()
    return total / (len(rows) * (TIME - 1)) / math.log(2)


def pretrain(name: str, seconds: float, learning_rate: float, stop: float, go_on: bool) -> dict:
    set_seed(int(go_on))
    training, tested = corpus()
    model = (AutoModelForCausalLM.from_pretrained(FOLDER / name) if go_on else build(name)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    draw = torch.Generator().manual_seed(int(go_on))
    curve: list[dict] = []
    spent, step, losses = 0.0, 0, []
    while spent < min(seconds, stop):
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate(spent / seconds)
        at = torch.randint(len(training) - TIME, (BATCH,), generator=draw)
        ids = torch.stack([training[n : n + TIME] for n in at.tolist()]).long()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()) / math.log(2))
        spent, step = spent + time.process_time() - start, step + 1
        if spent / seconds * POINTS >= len(curve) + 1:
            point = dict(step=step, seconds=spent, training=float(np.mean(losses)))
            curve.append(point | dict(held_out=held_out(model, tested, WINDOWS)))
            print(name, json.dumps(curve[-1]), flush=True)
            model.save_pretrained(FOLDER / name)
            losses = []
    return dict(
        parameters=model.num_parameters(),
        learning_rate=learning_rate,
        bytes=len(training),
        held_out_bytes=len(tested),
        steps=step,
        seconds=spent,
        held_out=held_out(model, tested, 8 * WINDOWS),
        curve=curve,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=tuple(RATES))
    parser.add_argument("--seconds", type=float, default=600.0, help="of the process's CPU time")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--stop", type=float, default=math.inf, help="after so many of them, with the schedule of all")
    parser.add_argument("--go_on", action="store_true", help="from the checkpoint there, with a new optimizer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learning_rate = options.learning_rate or RATES[options.name]
    found = pretrain(options.name, options.seconds, learning_rate, options.stop, options.go_on)
    path = results_path("pretrained")
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    before = results.get(options.name, []) if options.go_on else []
    save("pretrained", results | {options.name: [*before, found]})


if __name__ == "__main__":
    main()
