"""A run that meets a NaN stops there, and what was good stays good."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_rnn import MinGRUConfig, MinGRUForCausalLM, NonFiniteLossError, RecurrentTrainer


def make_trainer(folder, bad_step=None, **settings):
    torch.manual_seed(0)
    model = MinGRUForCausalLM(MinGRUConfig(hidden_size=8, num_hidden_layers=1))
    rows = torch.randint(0, 256, (40, 9)).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=8,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )

    class Poisoned(RecurrentTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * float("nan") if self.state.global_step == bad_step else loss

    return Poisoned(model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}))


def test_stops_with_step_batch_and_advice(tmp_path):
    trainer = make_trainer(tmp_path, bad_step=5)
    with pytest.raises(NonFiniteLossError, match=r"at step 5, batch .*input_ids \(2, 9\).*checkpoint-4.*learning rate"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    (batch,) = tmp_path.glob("_non_finite_batch_step_5_*.safetensors")
    assert load_file(batch)["input_ids"].shape == (2, 9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.isfinite(p).all() for p in loaded.parameters())


def test_gradients_count_as_well(tmp_path):
    """A finite loss whose gradient is not: the step is not made, and no such weights are saved."""
    trainer = make_trainer(tmp_path)
    compute_loss = trainer.compute_loss

    def poisoned(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        bad = trainer.state.global_step == 5
        return loss + (model.lm_head.weight * 0).sqrt().sum() if bad else loss

    trainer.compute_loss = poisoned
    with pytest.raises(NonFiniteLossError, match=r"gradient norm .* at step 5 .*checkpoint-4"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_says_so_before_the_first_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError, match="no checkpoint was saved yet"):
        make_trainer(tmp_path, bad_step=0).train()


def test_the_weights_are_those_before_the_step(tmp_path):
    stopped = make_trainer(tmp_path / "a", bad_step=3, save_strategy="no")
    with pytest.raises(NonFiniteLossError):
        stopped.train()
    good = make_trainer(tmp_path / "b", save_strategy="no")
    good.args.max_steps = 8
    good.add_callback(StopAfter(3))
    good.train()
    for x, y in zip(stopped.model.parameters(), good.model.parameters(), strict=True):
        assert torch.equal(x, y)


from transformers import TrainerCallback  # noqa: E402


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_finite_run_is_the_stock_trainers(tmp_path):
    from transformers import Trainer

    guarded = make_trainer(tmp_path / "a", save_strategy="no")
    guarded.train()
    stock = make_trainer(tmp_path / "b", save_strategy="no")
    stock = Trainer(stock.model, stock.args, train_dataset=stock.train_dataset)
    stock.train()
    for x, y in zip(guarded.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
def test_every_process_stops(tmp_path):
    """Two gloo processes, the NaN on one of them only: neither waits for the other."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        import os, torch
        from test_non_finite import make_trainer
        from hf_rnn import NonFiniteLossError
        trainer = make_trainer({str(tmp_path / "out")!r}, bad_step=3 if os.environ["RANK"] == "1" else None)
        try:
            trainer.train()
        except NonFiniteLossError as error:
            line = f"STOPPED {{os.environ['RANK']}} {{'nan' in str(error)}}\\n"
            os.write(1, line.encode())  # in one piece: print's would mix with the other process's
        """)
    )
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert sorted(line for line in result.stdout.splitlines() if "STOPPED" in line) == [
        "STOPPED 0 True",
        "STOPPED 1 True",
    ], result.stderr[-2000:]
