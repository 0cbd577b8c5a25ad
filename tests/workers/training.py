"""What a process of test_distributed.py does: `training.py FOLDER PART:KIND...` trains each kind for a part of a run.

Every process leaves its weights and the losses of each step. The global batch is the same whatever the
number of processes.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import accelerate.state
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_rnn
from hf_rnn.tasks import Retrieval

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STEPS, BATCH = 6, 8
PARTS = {"straight": (0, STEPS), "first": (0, 2), "second": (2, 4), "third": (4, STEPS)}  # steps made
TOKENS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)


def make_model(kind: str):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, **TOKENS)
    if kind in ("smt", "dmt"):
        sizes |= dict(vocab_size=5, num_hidden_layers=1, num_memory_tokens=2, updater="mlp")
        return hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(**sizes))
    if kind.endswith("xlstm"):
        return hf_rnn.XLSTMForCausalLM(hf_rnn.XLSTMConfig(vocab_size=17, num_heads=2, **sizes))
    if kind.endswith("tied"):
        return hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(vocab_size=17, tie_word_embeddings=True, **sizes))
    return hf_rnn.LSTMForCausalLM(hf_rnn.LSTMConfig(vocab_size=17, num_heads=2, **sizes))


def make_data(kind: str):
    """Rows of which some have few labels, so that a mean over processes is not the mean over tokens."""
    if kind in ("smt", "dmt"):
        return [Retrieval(length=8, symbols=4)[i] for i in range(64)]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 17, (50, 9), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < torch.linspace(0, 0.9, 50)[:, None], -100)
    labels[:, -1] = ids[:, -1]
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).with_format("torch")


def make_trainer(kind: str, folder: Path, callbacks: list[TrainerCallback], save: bool) -> Trainer:
    """A trainer of the kind whose batches and random numbers do not depend on the number of processes."""
    common = dict(output_dir=str(folder), max_steps=STEPS, logging_steps=1, learning_rate=1e-2)
    common |= dict(save_strategy="steps" if save else "no", save_steps=2)
    common |= dict(report_to="none", use_cpu=True, disable_tqdm=True, ddp_backend="gloo" if WORLD > 1 else None)
    common |= dict(per_device_train_batch_size=BATCH // WORLD, ddp_find_unused_parameters=False)
    if kind.startswith("fsdp"):
        common |= dict(fsdp=True, fsdp_config={"version": 2})
    data = make_data(kind)
    options = dict(train_dataset=data, eval_dataset=data, callbacks=callbacks)
    model = make_model(kind)
    if kind == "zo":  # the same rows for all, directions shared out
        shared = dict(per_device_train_batch_size=BATCH, num_directions=13, directions_per_forward=2)
        args = hf_rnn.ZOConfig(**common | shared)
        return hf_rnn.ZOTrainer(model, args, **options)
    if kind == "zo-data":
        args = hf_rnn.ZOConfig(**common, num_directions=8, data_shards=WORLD)
        return hf_rnn.ZOTrainer(model, args, **options)
    if kind == "smt":  # each process draws for itself: here nothing that matters
        memory = dict(teacher_encoder_layers=1, teacher_decoder_layers=1, first_share=1.0, coef_uniformity=0.0)
        return hf_rnn.SMTTrainer(model, hf_rnn.SMTConfig(**common | memory), **options)
    if kind == "dmt":
        teacher = hf_rnn.SMTTeacher.for_student(model, encoder_layers=1, decoder_layers=1)
        return hf_rnn.DMTTrainer(model, hf_rnn.DMTConfig(**common | dict(label_every=1)), teacher=teacher, **options)
    if kind.endswith("rate"):
        rate = dict(rate_shrink=0.3, target_bits=3.0, rate_every=2)
        return hf_rnn.RateConstrainedTrainer(model, hf_rnn.RateConstrainedConfig(**common | rate), **options)
    pieces: dict = dict(backprop="chunked", chunk_size=4)
    if kind == "stream":  # whose initial states are not met by each batch
        pieces |= dict(stream=True, stream_length=7, ddp_find_unused_parameters=True)
    if kind in ("chunked", "stream"):
        return hf_rnn.RecurrentTrainer(model, hf_rnn.RecurrentTrainingArguments(**common | pieces), **options)
    return hf_rnn.RecurrentTrainer(model, TrainingArguments(**common), **options)  # backpropagation, and its models


class StopAt(TrainerCallback):
    """A machine that goes away after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """accelerate shards over GPUs only; its code, and torch's, work over a CPU's processes as well."""
    state = accelerate.state.AcceleratorState
    before = state.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        before(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.__init__ = init
    try:
        yield
    finally:
        state.__init__ = before
        os.environ.pop("ACCELERATE_USE_FSDP", None)


def train(kind: str, part: str, folder: Path) -> None:
    start, stop = PARTS[part]
    runs = folder / kind / ("straight" if part == "straight" else "parts")
    trainer = make_trainer(kind, runs, [StopAt(stop)], save=part in ("first", "second"))
    trainer.train(resume_from_checkpoint=str(runs / f"checkpoint-{start}") if start else None)
    if part == "straight":
        trainer.save_model(str(folder / kind / "saved"))
    networks = {"": trainer.model, "teacher.": getattr(trainer, "teacher", None)}
    tensors = {prefix + name: whole(p) for prefix, m in networks.items() if m for name, p in m.named_parameters()}
    save_file(tensors, folder / f"{kind}-{part}-{WORLD}-{RANK}.safetensors")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if part == "straight" and kind in ("smt", "dmt"):
        assert {"eval_loss", "eval_drift", "eval_dynamics"} <= set(trainer.evaluate())
    (folder / f"{kind}-{part}-{WORLD}-{RANK}.json").write_text(json.dumps(losses))


def main() -> None:
    hf_rnn.RateCallback.on_train_end = lambda *args, **kwargs: None  # no pictures
    for job in sys.argv[2:]:
        part, kind = job.split(":")
        with fsdp_on_cpu() if kind.startswith("fsdp") else nullcontext():
            train(kind, part, Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads do not survive the interpreter's end


if __name__ == "__main__":
    main()
