"""SMT in the paper's setting, then DMT, for as long as there is time, and what the student reads alone afterwards.

    python benchmarks/memory_paper.py [--minutes 6] [--data my.txt]     # the documentation in CPython without --data

A memory of 16 x 256, a transformer of 8 layers as updater, a teacher of 8 + 4 layers, 128 rows of 320 tokens:
`SMTConfig.preset("paper")`. A call goes on with SMT where the one before stopped (build/memory_paper); DMT, from there,
takes the last fifth of its minutes. Nats per token are of held-out rows from the empty memory. `hf-rnn plan --trainer
smt` says on paper what a step takes.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from driver import DRY, GPU, save, sized
from memory_language import mean_loss
from memory_presets import documents, quietly
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_rnn
from hf_rnn import DMTConfig, DMTTrainer, SMTConfig, SMTTrainer
from hf_rnn.cli.data import blocks

NETWORK = dict(hidden_size=256, num_memory_tokens=16, updater="transformer", updater_layers=8, num_heads=8)
TINY = dict(hidden_size=16, num_memory_tokens=2, updater="transformer", updater_layers=1, num_heads=2)
TINY_TEACHER = dict(teacher_hidden_size=16, teacher_encoder_layers=1, teacher_decoder_layers=1, teacher_heads=2)
TOKENS = sized(*2 * [320], dry=12)
STEPS = sized(*2 * [{}], dry=dict(max_steps=2))
FOLDER = Path(__file__).parents[1] / "build" / "memory_paper"


class Until(TrainerCallback):
    """Ends after so many seconds, with a checkpoint; keeps losses and seconds of steps."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if GPU:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)
        if time.perf_counter() > self.end:
            control.should_save = control.should_training_stop = control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            names = ("loss", "decoder_first", "dynamics", "readout")
            shown = " ".join(f"{name} {float(logs[name]):.3f}" for name in names if name in logs)
            print(f"step {state.global_step}: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--data", help="a text file or data set")
    parser.add_argument("--rows", type=int, default=sized(128, 128, 2))
    parser.add_argument("--folder", default=str(FOLDER), help="of the checkpoint that a call goes on from")
    options = parser.parse_args()
    seen, unseen = documents(options.data)
    data, held_out = blocks(seen, TOKENS + 1), list(blocks(unseen, TOKENS + 1))[: sized(64, 64, 2)]
    set_seed(0)
    names = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    model = hf_rnn.MemoryRNNForCausalLM(hf_rnn.MemoryRNNConfig(vocab_size=259, **TINY if DRY else NETWORK, **names))
    common = dict(
        report_to="none", use_cpu=not GPU, bf16=GPU, disable_tqdm=True, per_device_train_batch_size=options.rows
    )
    common |= dict(save_total_limit=1) | STEPS
    smt = dict(common, save_steps=10**9, logging_steps=sized(10, 10, 1)) | (TINY_TEACHER if DRY else {})
    watch = Until(0.8 * 60 * options.minutes)
    args = SMTConfig.preset("paper", options.folder, **smt)
    trainer = quietly(SMTTrainer(model, args, train_dataset=data, callbacks=[watch]))
    last = get_last_checkpoint(options.folder) if Path(options.folder).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    result = dict(parameters=model.num_parameters(), losses=watch.losses, seconds=watch.seconds)
    result |= dict(smt_steps=trainer.state.global_step, tokens_of_row=TOKENS, rows=options.rows)
    result |= dict(gib=torch.cuda.max_memory_allocated() / 2**30 if GPU else None)
    result["nats_smt"] = mean_loss(trainer.model, to_device(held_out, model.device))
    save("memory_paper", result)
    watch = Until(0.2 * 60 * options.minutes)
    dmt = dict(
        common,
        save_strategy="no",
        logging_steps=sized(10, 10, 1),
        per_device_train_batch_size=max(1, options.rows // 4),
    )
    args = DMTConfig.preset("paper", str(Path(options.folder) / "dmt"), **dmt)
    student = copy.deepcopy(model)
    trainer = quietly(DMTTrainer(student, args, trainer.teacher, train_dataset=data, callbacks=[watch]))
    trainer.train()
    result |= dict(dmt_steps=trainer.state.global_step, dmt_seconds=watch.seconds)
    result["nats_dmt"] = mean_loss(student, to_device(held_out, model.device))
    print(f"nats per token alone: {result['nats_smt']:.3f} after SMT, {result['nats_dmt']:.3f} after DMT")
    save("memory_paper", result)


def to_device(rows: list, device: torch.device) -> list:
    return [{name: x.to(device) for name, x in row.items()} for row in rows]


if __name__ == "__main__":
    main()
