"""The two small tasks that `pretrained_rate.py` fine-tunes on, and one fine-tuning.

"which module": 128 bytes, from which of four modules of the standard library are they; of every three passages one is
held out, 240 to train on and 75 held out of each module. "one module": the text of `turtle.py`, 115,000 bytes to
train on, the last fifth held out, its next-byte accuracy. Neither is in what the models were pretrained on.
"""

import math
import tempfile
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from pretrained import FOLDER, LEARNED, module
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from hf_rnn import RateConstrainedConfig, RateConstrainedTrainer

CLASSES = ("_pydecimal", "ipaddress", "mailbox", "pickletools")
TASKS = ("which module", "one module")
PASSAGE, TRAINED, TESTED, WINDOW = 128, 240, 75, 128  # bytes of a passage; passages of a class; bytes of a window
STEPS, BATCH = 160, {"which module": 8, "one module": 8}
RATES = {"minGRU": 1e-3, "GPT-2": 1e-3}
LORA_RATE = 3e-3


@cache
def data(task: str) -> tuple[Dataset, Tensor, Tensor]:
    """Rows to train on; inputs held out, (N, T); classes (N,), or the inputs once more."""
    if task == "one module":
        ids = torch.from_numpy(module(LEARNED)).long()
        cut = len(ids) * 4 // 5
        rows, held = (x[: len(x) // WINDOW * WINDOW].view(-1, WINDOW) for x in (ids[:cut], ids[cut:]))
        return Dataset.from_dict({"input_ids": rows.numpy(), "labels": rows.numpy()}).with_format("torch"), held, held
    draw, parts = torch.Generator().manual_seed(0), []
    for label, name in enumerate(CLASSES):
        ids = torch.from_numpy(module(name)).long()
        rows = ids[: len(ids) // PASSAGE * PASSAGE].view(-1, PASSAGE)
        tested = torch.arange(len(rows)) % 3 == 2
        for chosen, count in ((rows[~tested], TRAINED), (rows[tested], TESTED)):
            chosen = chosen[torch.randperm(len(chosen), generator=draw)[:count]]
            parts.append((chosen, torch.full((len(chosen),), label)))
    (x, y), (held, classes) = ((torch.cat(values) for values in zip(*parts[i::2], strict=True)) for i in (0, 1))
    rows = {"input_ids": x.numpy(), "labels": y.numpy()}
    return Dataset.from_dict(rows).with_format("torch"), held, classes


def load(name: str, task: str) -> PreTrainedModel:
    """The pretrained model; a new head is drawn anew."""
    if task == "one module":
        return AutoModelForCausalLM.from_pretrained(FOLDER / name)
    return AutoModelForSequenceClassification.from_pretrained(FOLDER / name, num_labels=len(CLASSES))


def fit(name: str, task: str, seed: int, lora: bool = False, **settings: Any) -> tuple[PreTrainedModel, dict]:
    """Fine-tune with a `RateConstrainedConfig`'s settings; the model and what was logged last."""
    set_seed(seed)
    model: Any = load(name, task)
    if lora:
        from peft import LoraConfig, TaskType, get_peft_model

        kind = TaskType.CAUSAL_LM if task == "one module" else TaskType.SEQ_CLS
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=kind)
        model = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH[task],
            learning_rate=LORA_RATE if lora else RATES[name],
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs=dict(min_lr_rate=0.05),
            warmup_steps=10,
            logging_steps=20,
            seed=seed,
            use_cpu=True,
            bf16=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            rate_shrink=0.0,
        )
        args = RateConstrainedConfig(**common | settings)
        trainer = RateConstrainedTrainer(model, args, train_dataset=data(task)[0])
        trainer.train()
        logged = {key: x for key, x in trainer.state.log_history[-2].items() if isinstance(x, float)}
    return model, logged


@torch.no_grad()
def measure(model: PreTrainedModel, task: str, inputs: Tensor | None = None, labels: Tensor | None = None) -> dict:
    """`accuracy`, of classes or of next bytes, and `loss`, nats or bits a byte; held out where nothing is given."""
    if inputs is None or labels is None:
        _, inputs, labels = data(task)
    model.eval()
    right = total = count = 0.0
    for x, y in zip(inputs.split(64), labels.split(64), strict=True):
        logits = model(input_ids=x, use_cache=False).logits
        if task == "one module":
            logits, y = logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()
        right += float((logits.argmax(-1) == y).sum())
        total += float(F.cross_entropy(logits, y, reduction="sum"))
        count += len(y)
    unit = math.log(2) if task == "one module" else 1.0
    return dict(accuracy=right / count, loss=total / count / unit)
