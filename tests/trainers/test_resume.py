"""A run that is interrupted and resumed is the run that was not, bit for bit."""

import math
import random

import numpy
import pytest
import torch
from runs import TRAINERS, At, make_trainer, same, stop
from transformers import Trainer

from hf_rnn import RecurrentTrainer, RecurrentTrainingArguments
from hf_rnn_trainers.reliability.manifest import checkpoints


class TestExactResume:
    @pytest.mark.parametrize("name", list(TRAINERS))
    @pytest.mark.parametrize("step", [4, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 6)]])
    def test_bit_for_bit(self, name, step, tmp_path):
        """With dropout, in the middle of an epoch of six batches, and where one ends."""
        straight = make_trainer(tmp_path / "a", name, save_strategy="no")
        straight.train()
        make_trainer(tmp_path / "b", name, callbacks=[At(step, stop)], save_strategy="no").train()
        assert [path.name for path in checkpoints(tmp_path / "b")] == [f"checkpoint-{step}"]
        resumed = make_trainer(tmp_path / "b", name, save_strategy="no")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 7
        assert same(straight, resumed)
        losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (straight, resumed)]
        assert losses[0] == losses[1]

    def test_an_evaluation_at_the_end_of_an_epoch_changes_nothing(self, tmp_path):
        """The checkpoint of the epoch's last step is from before the evaluation, which draws a random number."""
        settings = dict(eval_strategy="epoch", save_steps=3, gradient_accumulation_steps=2)
        straight = make_trainer(tmp_path, **settings)
        straight.train()
        resumed = make_trainer(tmp_path / "b", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert same(straight, resumed)

    @pytest.mark.parametrize("step", [2, 3, 5])
    @pytest.mark.parametrize("name", ["backpropagation", "stream"])
    def test_of_a_length_that_nobody_knows(self, name, step, tmp_path):
        """In the second pass over it as well."""
        settings = dict(save_strategy="no", unknown_length=True)
        straight = make_trainer(tmp_path / "a", name, **settings)
        straight.train()
        make_trainer(tmp_path / "b", name, callbacks=[At(step, stop)], **settings).train()
        resumed = make_trainer(tmp_path / "b", name, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 7 and same(straight, resumed)

    def test_a_finished_run_makes_no_further_step(self, copy, run):
        trainer = make_trainer(copy)
        output = trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 7 and same(trainer, run[1])
        assert math.isnan(output.training_loss)

    def test_is_the_stock_trainer(self, run, tmp_path):
        args = run[1].args
        args = RecurrentTrainingArguments(
            **{k: getattr(args, k) for k in ("max_steps", "learning_rate", "use_cpu")},
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            output_dir=str(tmp_path),
            report_to="none",
        )
        base = make_trainer(tmp_path)
        stock = Trainer(base.model, args, train_dataset=base.train_dataset)
        stock.train()
        assert same(stock, run[1])


class TestOrderOfData:
    @pytest.mark.parametrize("name", ["backpropagation", "zo"])
    def test_grouped_by_length(self, name, tmp_path):
        """Its sampler draws from the numbers that come next; steps are in the middle of the second epoch."""
        settings = dict(train_sampling_strategy="group_by_length", max_steps=8 if name == "zo" else 5, save_steps=1)
        straight = make_trainer(tmp_path, name, **settings)
        straight.train()
        step = 7 if name == "zo" else 4
        resumed = make_trainer(tmp_path / "b", name, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(straight, resumed)
        again = make_trainer(tmp_path / "c", name, **settings)  # from what the resumed run saved in that epoch
        again.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{step + 1}"))
        assert same(straight, again)

    def test_a_group_that_is_not_known_is_told(self, copy, caplog):
        (copy / "checkpoint-4/manifest.json").unlink()
        (copy / "checkpoint-4/epoch_rng_state.pth").unlink()
        trainer = make_trainer(copy, train_sampling_strategy="group_by_length", save_strategy="no")
        with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
            trainer.train(resume_from_checkpoint=str(copy / "checkpoint-4"))
        assert "does not have epoch_rng_state.pth: the rest of this epoch is grouped otherwise" in caplog.text

    def test_a_sampler_of_ones_own(self, tmp_path):
        """That draws from Python's and numpy's random numbers."""

        class Own(torch.utils.data.Sampler):
            def __init__(self, count):
                self.count = count

            def __len__(self):
                return self.count

            def __iter__(self):
                return iter(sorted(range(self.count), key=lambda _: random.random() + numpy.random.rand()))

        class Sampled(RecurrentTrainer):
            def _get_train_sampler(self, train_dataset=None):
                return Own(len(self.train_dataset))

        straight = make_trainer(tmp_path, base=Sampled, save_steps=4)
        straight.train()
        resumed = make_trainer(tmp_path, base=Sampled, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert same(straight, resumed)

    @pytest.mark.slow
    def test_workers_that_stay(self, tmp_path):
        """As without them, resumed in the middle of the first epoch and at its end."""
        workers = dict(
            dataloader_num_workers=1, dataloader_persistent_workers=True, dataloader_multiprocessing_context="fork"
        )
        workers |= dict(max_steps=4)
        plain = make_trainer(tmp_path / "plain", save_strategy="no", max_steps=4)
        plain.train()
        straight = make_trainer(tmp_path, save_steps=1, **workers)
        straight.train()
        assert same(plain, straight)
        for step in (2, 3):
            resumed = make_trainer(tmp_path / "b", save_strategy="no", **workers)
            resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert same(plain, resumed), step
