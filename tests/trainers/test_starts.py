"""A run begins from what it is given: its own model, its own settings, and nothing of a run or a try before it."""

import pytest
import torch
from runs import TRAINERS, make_trainer, same
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

import hf_rnn


def with_model_init(folder, name, **settings):
    """A trainer whose every run has a model of its own."""
    given = make_trainer(folder, name, save_strategy="no", **settings)

    def make():
        return make_trainer(folder, name, save_strategy="no").model

    return type(given)(model_init=make, args=given.args, train_dataset=given.train_dataset)


class Trial(dict):
    """Of a search, with what Trainer asks of optuna's."""

    def __init__(self, number, **params):
        super().__init__(params)
        self.number, self.params = number, params


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("hf_rnn_trainers.rate.rate_callback.draw_rate", lambda *_: None)


class TestModelInit:
    @pytest.mark.parametrize(
        "name, settings",
        [("backpropagation", {}), ("zo", {}), ("zo", dict(optim="sgd")), ("rate", {})],
        ids=["backpropagation", "zo-adamw", "zo-sgd", "rate"],
    )
    def test_every_run_trains_its_own_model(self, name, settings, tmp_path):
        trainer = with_model_init(tmp_path, name, max_steps=4, **settings)
        before = weights(trainer)
        trainer.train()
        first = weights(trainer)
        trainer.train()
        assert not equal(first, before) and equal(weights(trainer), first)
        if name == "zo":
            replayed = hf_rnn.ZOTrainer.replay(make_trainer(tmp_path, name).model, tmp_path / "zo_replay.jsonl")
            assert equal(replayed.parameters(), first)

    @pytest.mark.parametrize(
        "name, params", [("zo", dict(rank=2, num_directions=3, optim="sgd")), ("rate", dict(rate_shrink=0.5))]
    )
    def test_a_search_changes_what_a_run_does(self, name, params, tmp_path, monkeypatch):
        """As hyperparameter_search runs a trial; what was built from the settings before is built again."""
        monkeypatch.setattr("transformers.integrations.hp_params", dict)  # else one of its libraries has to be there
        searched = with_model_init(tmp_path / "searched", name, max_steps=3)
        searched.hp_search_backend, searched.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
        searched.train(trial=Trial(0))
        other = weights(searched)
        searched.train(trial=Trial(1, **params))
        told = with_model_init(tmp_path / "told", name, max_steps=3, **params)
        told.train()
        assert same(searched, told) and not equal(other, weights(told))
        if name == "zo":
            log = tmp_path / "searched/run-1/zo_replay.jsonl"
            assert log.read_text() == (tmp_path / "told/zo_replay.jsonl").read_text()

    @pytest.mark.parametrize("name", ["smt", "dmt"])
    def test_refused_where_a_teacher_fits_one_model(self, name, tmp_path):
        given = make_trainer(tmp_path, name)
        with pytest.raises(ValueError, match="model_init: .*make a trainer for each trial"):
            type(given)(model_init=lambda: given.model, args=given.args)

    def test_a_teacher_that_another_trainer_froze_learns_again(self, tmp_path):
        smt = make_trainer(tmp_path, "smt", max_steps=2, save_strategy="no")
        dmt_args = hf_rnn.DMTConfig(str(tmp_path), report_to="none", use_cpu=True)
        hf_rnn.DMTTrainer(smt.model, dmt_args, teacher=smt.teacher)
        before = [p.detach().clone() for p in smt.teacher.parameters()]
        smt.train()
        assert not equal(smt.teacher.parameters(), before)


class SameNumbers(TrainerCallback):
    """Dropout draws the same in every try."""

    def on_train_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed)


class TestBatchSize:
    @pytest.mark.parametrize("name", ["backpropagation", "zo", "smt"])
    def test_a_try_that_failed_leaves_nothing(self, name, tmp_path):
        """Out of memory in the second half of a step; the next try is the run with the smaller batch."""
        settings = dict(gradient_accumulation_steps=2, max_steps=2, save_strategy="no", callbacks=[SameNumbers()])
        found = make_trainer(tmp_path, name, per_device_train_batch_size=3, auto_find_batch_size=True, **settings)
        step, calls = found.training_step, []

        def short_of_memory(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(*args, **kwargs)

        found.training_step = short_of_memory
        told = make_trainer(tmp_path, name, per_device_train_batch_size=2, **settings)
        for trainer in (found, told):
            trainer.train()
        assert found._train_batch_size == 2 and same(found, told)
        logs = [
            [
                {k: x for k, x in entry.items() if "runtime" not in k and "second" not in k}
                for entry in t.state.log_history
            ]
            for t in (found, told)
        ]
        assert logs[0] == logs[1]

    def test_skipped_steps_count_anew_and_the_log_says_what_it_misses(self, tmp_path, caplog):
        """A step is left out and another made before memory runs out."""
        trainer = make_trainer(
            tmp_path, "zo", auto_find_batch_size=True, per_device_train_batch_size=4, max_skipped_steps=1, max_steps=3
        )
        losses = trainer._losses

        def poisoned(inputs, step):
            if step == 2 and trainer._train_batch_size == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return losses(inputs, step) * (float("nan") if step == 1 else 1)

        trainer._losses = poisoned
        with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
            trainer.train()
        assert trainer.state.log_history[-2]["skipped_steps"] == 1
        assert "out of memory after 2 steps; begins anew" in caplog.text
        assert "cannot be replayed to the weights of this run: auto_find_batch_size" in caplog.text
        with pytest.raises(ValueError, match="auto_find_batch_size began anew after 2 steps"):
            hf_rnn.ZOTrainer.replay(trainer.model, tmp_path)


class TestArguments:
    @pytest.mark.parametrize("name", list(TRAINERS))
    def test_none_is_the_defaults_and_others_are_refused(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trainer_class, args_class, _ = TRAINERS[name]
        given = make_trainer(tmp_path, name)
        options = dict(teacher=given.teacher) if name == "dmt" else {}
        assert type(trainer_class(given.model, **options).args) is args_class
        wrong = [{"max_steps": 3}]
        wrong += (
            []
            if name in ("backpropagation", "stream")
            else [TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)]
        )
        for args in wrong:
            with pytest.raises(TypeError, match=f"args: expected a .*, got {type(args).__name__}"):
                trainer_class(given.model, args, **options)
