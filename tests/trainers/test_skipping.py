"""Steps that are not finite are left out as often as asked, and leave nothing behind."""

import math

import pytest
import torch
from runs import At, make_trainer
from transformers import TrainerCallback

import hf_rnn
from hf_rnn import NonFiniteLossError, RecurrentTrainer, RecurrentTrainingArguments
from hf_rnn_trainers.reliability.manifest import checkpoints


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("hf_rnn_trainers.rate.rate_callback.draw_rate", lambda *_: None)


class Poisoned(RecurrentTrainer):
    """Loss or gradient is NaN in some steps."""

    loss_at: tuple = ()
    gradient_at: tuple = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step in self.loss_at:
            return loss * float("nan")
        if self.state.global_step in self.gradient_at:
            return loss + (model.lm_head.weight * 0).sqrt().sum()
        return loss


class TestNonFinite:
    def test_skips_as_many_as_asked(self, tmp_path):
        digests = {}
        trainer = make_trainer(tmp_path, base=Poisoned, max_skipped_steps=2, logging_steps=7, save_strategy="no")
        trainer.loss_at, trainer.gradient_at = (1,), (3,)

        class Digest(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                digests[state.global_step] = [p.detach().clone() for p in model.parameters()]

        trainer.add_callback(Digest())
        trainer.train()
        for before, after, moved in [(1, 2, False), (3, 4, False), (4, 5, True)]:
            pairs = zip(digests[before], digests[after], strict=True)
            assert any(not torch.equal(a, b) for a, b in pairs) == moved
        (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert log["skipped_steps"] == 2 and 3 < log["loss"] < 5  # the mean of six, near log(60)
        trainer.gradient_at = (3, 4)
        with pytest.raises(NonFiniteLossError, match="gradient norm nan at step 4"):
            trainer.train()

    def test_the_loss_logged_is_that_of_the_other_steps(self, tmp_path):
        kept = make_trainer(tmp_path, base=Poisoned, save_strategy="no", max_skipped_steps=7)
        kept.loss_at = (0, 2)
        assert 3 < kept.train().training_loss < 5
        losses = [entry["loss"] for entry in kept.state.log_history if "loss" in entry]
        assert [math.isnan(x) for x in losses] == [True, False, True, False, False, False, False]
        whole = make_trainer(tmp_path, base=Poisoned, save_strategy="no", max_skipped_steps=7, logging_steps=7)
        whole.loss_at = (0, 2)
        whole.train()
        (loss,) = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
        finite = [x for x in losses if not math.isnan(x)]
        assert loss == pytest.approx(sum(finite) / len(finite), abs=1e-3)

    @pytest.mark.parametrize("name", ["zo", "smt", "rate"])
    def test_a_skipped_step_changes_no_weight(self, name, tmp_path):
        settings = dict(quantization_aware=False) if name == "rate" else {}
        settings |= dict(max_skipped_steps=1, max_steps=3, save_strategy="no", weight_decay=0.1)
        trainer = make_trainer(tmp_path, name, **settings)
        training_step, seen = trainer.training_step, []

        def step(model, inputs, *args):
            poisoned = trainer.state.global_step == 1
            seen.append([p.detach().clone() for p in trainer.model.parameters()])
            if poisoned:
                norm = trainer.model.model.norm.weight
                good = norm.detach().clone()
                with torch.no_grad():
                    norm.fill_(float("nan"))
            result = training_step(model, inputs, *args)
            if poisoned:
                with torch.no_grad():
                    norm.copy_(good)
            return result

        trainer.training_step = step
        trainer.train()
        assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
        if name == "zo":
            replayed = hf_rnn.ZOTrainer.replay(make_trainer(tmp_path / "b", name).model, tmp_path / "zo_replay.jsonl")
            assert all(
                torch.equal(x, y) for x, y in zip(replayed.parameters(), trainer.model.parameters(), strict=True)
            )

    def test_no_such_weights_are_saved(self, tmp_path):
        """A step that a callback spoils is found before its checkpoint is written."""

        def spoil(control):
            with torch.no_grad():
                trainer.model.lm_head.weight[3, 2] = float("inf")

        trainer = make_trainer(tmp_path, callbacks=[At(4, spoil)])
        with pytest.raises(
            NonFiniteLossError, match="lm_head.weight: not finite after step 4, .* not saved.*checkpoint-2"
        ):
            trainer.train()
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
        with pytest.raises(NonFiniteLossError):
            trainer.save_model()
        assert not (tmp_path / "model.safetensors").exists()

    def test_bad_limit(self, tmp_path):
        with pytest.raises(ValueError, match="max_skipped_steps: expected at least 0"):
            RecurrentTrainingArguments(str(tmp_path), max_skipped_steps=-1)


def without_targets(trainer, rows):
    """The trainer, with nothing to predict in these rows, in the order of the data."""
    data = [dict(row, labels=torch.full_like(row["labels"], -100) if n in rows else row["labels"]) for n, row in
            enumerate(trainer.train_dataset)]  # fmt: skip
    trainer.train_dataset = data
    return trainer


class TestWithoutTargets:
    @pytest.mark.parametrize("name", ["backpropagation", "zo", "rate"])
    def test_a_step_of_such_data_is_left_out(self, name, tmp_path, caplog):
        """With a warning, and counted by no limit; the others are as they were."""
        settings = dict(save_strategy="no", train_sampling_strategy="sequential", max_steps=2, weight_decay=0.1)
        trainer = make_trainer(tmp_path, name, gradient_accumulation_steps=2, **settings)
        without_targets(trainer, {4, 5, 6, 7})
        seen = []
        for step in (1, 2):  # training in quantised weights rounds them once more at its end
            trainer.add_callback(
                At(step, lambda _: seen.append([p.detach().clone() for p in trainer.model.parameters()]))
            )
        with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
            trainer.train()
        assert caplog.text.count("step 1: all labels are -100, nothing to learn from; left out") == 1
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert math.isfinite(losses[0]) and math.isnan(losses[1])
        assert "skipped_steps" not in trainer.state.log_history[-1]
        assert not list(tmp_path.glob("_non_finite*"))

    @pytest.mark.parametrize("name", ["backpropagation", "zo", "smt", "dmt", "rate"])
    def test_a_batch_of_such_data_in_a_step_adds_nothing(self, name, tmp_path):
        settings = dict(save_strategy="no", train_sampling_strategy="sequential", max_steps=2)
        trainer = without_targets(make_trainer(tmp_path, name, gradient_accumulation_steps=2, **settings), {2, 3})
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
        assert math.isfinite(trainer.state.log_history[0]["loss"])

    @pytest.mark.parametrize("own_loss", [False, True])
    def test_estimates_are_those_of_the_other_batches(self, own_loss, tmp_path):
        class Own(hf_rnn.ZOTrainer):
            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs)

        base = Own if own_loss else None
        settings = dict(save_strategy="no", train_sampling_strategy="sequential", max_steps=1)
        with_it = make_trainer(tmp_path / "a", "zo", base, gradient_accumulation_steps=2, **settings)
        alone = make_trainer(tmp_path / "b", "zo", base, **settings)
        without_targets(with_it, {2, 3}).train()
        alone.train()
        for a, b in zip(with_it.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
