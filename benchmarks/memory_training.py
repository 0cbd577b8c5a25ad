"""What the benchmarks of Supervised Memory Training share: the same student trained in each way, with the same settings
for all, and what it can do afterwards, alone, from the empty memory.

Each process runs on one thread: the networks are small, and two runs fit on two cores.
"""

import dataclasses
import os
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed

import hf_rnn
from hf_rnn.tasks import SyntheticTask, accuracy

COMMON: dict[str, Any] = dict(
    report_to="none",
    use_cpu=True,
    save_strategy="no",
    logging_steps=50,
    disable_tqdm=True,
    dataloader_pin_memory=False,
    adam_beta2=0.95,
    weight_decay=0.01,
    max_grad_norm=1.0,
    lr_scheduler_type="cosine_with_min_lr",
    lr_scheduler_kwargs=dict(min_lr_rate=0.1),
    warmup_steps=50,
)


class Clock(TrainerCallback):
    """Seconds of training, without evaluations; stops at a limit; prints the losses where asked to."""

    def __init__(self, limit: float = float("inf"), name: str = ""):
        self.limit, self.name, self.steps, self.seconds = limit, name, 0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.start
        self.steps += 1
        control.should_training_stop |= self.seconds > self.limit

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.name and state.global_step % 100 == 0 and "loss" in logs:
            names = ("loss", "decoder_first", "dynamics", "readout")
            shown = " ".join(f"{name} {float(logs[name]):.3f}" for name in names if name in logs)
            print(f"  {self.name} step {state.global_step} ({self.seconds:.0f} s): {shown}", flush=True)


def student(vocab_size: int, seed: int, updater: str = "mlp", tokens: int = 2, size: int = 64, **settings):
    """A memory RNN of the prototype's size."""
    set_seed(seed)
    names = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    shape = dict(vocab_size=vocab_size, hidden_size=size, num_memory_tokens=tokens, updater=updater, updater_layers=2)
    return hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(**names | shape | settings))


def transformer(vocab_size: int, seed: int, parameters: int) -> LlamaForCausalLM:
    """A causal transformer of two layers, of about as many parameters."""
    set_seed(seed)
    size = max(16, int((parameters / 2 / 10) ** 0.5) // 16 * 16)  # a layer has 4 D^2 + 3 D 2D
    sizes = dict(hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2, num_attention_heads=4)
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **tokens, initializer_range=0.06))


def fit(trainer_class: Any, config_class: Any, model: Any, data: Any, settings: dict, clock: Clock, **kwargs) -> Any:
    """Train in a folder that is thrown away; returns the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(folder, **COMMON | settings)
        trainer = trainer_class(model, args, train_dataset=data, callbacks=[clock], **kwargs)
        from transformers.trainer_callback import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return trainer


def smt(model: Any, data: Any, steps: int, clock: Clock, teacher: Any = None, **settings) -> Any:
    """SMT; returns the teacher. Defaults: those that the retrieval task was tuned with, on its seed 0 at T = 32."""
    defaults = dict(max_steps=steps, learning_rate=2e-3, per_device_train_batch_size=64, all_positions=True)
    windows = dict(context_size=4096, future_size=4096)
    teacher_size = dict(teacher_hidden_size=model.config.hidden_size, teacher_queries=False)
    settings = defaults | windows | teacher_size | settings
    return fit(hf_rnn.SMTTrainer, hf_rnn.SMTConfig, model, data, settings, clock, teacher=teacher).teacher


def dmt(model: Any, teacher: Any, data: Any, steps: int, clock: Clock, **settings) -> None:
    """DMT after it, with half of SMT's learning rate."""
    defaults = dict(max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=64, label_every=1, warmup_steps=5)
    settings = defaults | dict(context_size=4096) | settings
    fit(hf_rnn.DMTTrainer, hf_rnn.DMTConfig, model, data, settings, clock, teacher=teacher)


def bptt(model: Any, data: Any, steps: int, clock: Clock, trainer_class: Any = None, **settings) -> None:
    """Backpropagation through time, Trainer's own loss."""
    defaults = dict(max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=64)
    fit(trainer_class or hf_rnn.RecurrentTrainer, TrainingArguments, model, data, defaults | settings, clock)


@torch.no_grad()
def score(model: Any, task: SyntheticTask, rows: int = 1024, batch: int = 128) -> float:
    """Accuracy on rows that no training saw: the model alone, from the empty memory."""
    unseen = dataclasses.replace(task, size=rows, seed=10**6 + task.seed)
    predictions, labels = [], []
    for at in range(0, rows, batch):
        items = [unseen[i] for i in range(at, min(at + batch, rows))]
        predictions.append(model(torch.stack([item["input_ids"] for item in items])).logits.argmax(-1))
        labels.append(torch.stack([item["labels"] for item in items]))
    return accuracy(torch.cat(predictions), torch.cat(labels))["accuracy"]
