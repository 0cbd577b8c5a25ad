"""A replay log leads to the weights of its run, or the run says that it does not."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from zo_runs import DEFAULTS, make_data, make_model, make_trainer, same

from hf_rnn import ZOConfig, ZOTrainer, accept_checkpoint

SAVING = dict(save_strategy="steps", save_steps=2, max_steps=4, num_directions=4)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_logs_of_a_run_that_went_on_elsewhere_with_other_settings(optim, tmp_path):
    """The optimizer keeps some of the settings that it began with, and takes others: the log has what it used."""
    settings = SAVING | dict(optim=optim, learning_rate=0.01, weight_decay=0.3)
    make_trainer(tmp_path / "a", **settings).train()
    settings |= dict(weight_decay=0.0, adam_beta1=0.5, estimator="fd", num_directions=3, epsilon=0.01)
    resumed = make_trainer(tmp_path / "b", **settings)

    class Decay(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer.param_groups[0]["weight_decay"] = 0.1 * state.global_step

    resumed.add_callback(Decay())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert same(ZOTrainer.replay(make_model(), tmp_path / "b"), resumed.model)
    for checkpoint in (tmp_path / "a/checkpoint-2", tmp_path / "b/checkpoint-4"):
        assert same(ZOTrainer.replay(make_model(), checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint))


def test_logs_of_a_run_that_went_on_from_other_weights(tmp_path):
    make_trainer(tmp_path / "a", **SAVING).train()
    checkpoint = tmp_path / "a/checkpoint-2"
    changed = AutoModelForCausalLM.from_pretrained(checkpoint)
    changed.lm_head.weight.data.mul_(1.5)
    changed.save_pretrained(checkpoint)
    accept_checkpoint(checkpoint)
    make_trainer(tmp_path / "b", **SAVING).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="checkpoint-2 was changed after it was saved, and accepted"):
        ZOTrainer.replay(make_model(), tmp_path / "b")


def test_logs_of_a_run_that_ends_with_its_best_weights(tmp_path):
    """And of what is saved of it elsewhere."""
    args = ZOConfig(
        **DEFAULTS | SAVING | dict(output_dir=str(tmp_path), metric_for_best_model="loss"),
        **dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True),
    )
    trainer = ZOTrainer(make_model(), args, train_dataset=make_data(), eval_dataset=make_data(5))
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert same(ZOTrainer.replay(make_model(), tmp_path), trainer.model)
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert same(ZOTrainer.replay(make_model(), tmp_path / "elsewhere"), trainer.model)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(seed=3), "with seed=3 instead of 42"),
        (dict(rank=2), "with rank=2 instead of 1"),
        (dict(max_grad_norm=0.1), "with max_grad_norm=0.1 instead of 0.5"),
    ],
)
def test_logs_that_end_where_other_directions_begin(change, reason, tmp_path, caplog):
    settings = SAVING | dict(max_grad_norm=0.5)
    make_trainer(tmp_path, **settings).train()
    with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
        make_trainer(tmp_path, **settings | change).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "cannot be replayed to the weights of this run" in caplog.text and reason in caplog.text
    with pytest.raises(ValueError, match=reason):
        ZOTrainer.replay(make_model(), tmp_path)


def test_logs_that_never_were(tmp_path, caplog):
    make_trainer(tmp_path / "a", replay_log=False, **SAVING).train()
    with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
        resumed = make_trainer(tmp_path / "b", **SAVING)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert "checkpoint-2, which the weights go back to, has no log" in caplog.text
    with pytest.raises(ValueError, match="has no log"):
        ZOTrainer.replay(make_model(), tmp_path / "b")


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_logs_of_a_second_run_with_the_same_trainer(optim, tmp_path, caplog):
    """From the weights that the first made; Adam's averages are in no log."""
    trainer = make_trainer(tmp_path, optim=optim, max_steps=2)
    trainer.train()
    base = copy.deepcopy(trainer.model)
    with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
        trainer.train()
    if optim == "sgd":
        assert same(ZOTrainer.replay(base, tmp_path), trainer.model)
    else:
        assert "what it had kept from an earlier call of train()" in caplog.text
        with pytest.raises(ValueError, match=r"an earlier call of train\(\)"):
            ZOTrainer.replay(base, tmp_path)


def test_logs_do_not_have_a_step_that_was_not_made(tmp_path):
    """Its estimate was there, but a gradient of it was not finite."""
    trainer = make_trainer(tmp_path, optim="adamw_torch", max_steps=3, max_skipped_steps=1)
    give = trainer._give

    def overflow(step, c):
        give(step, c)
        if step == 1:
            trainer.model.lm_head.weight.grad[0] = float("inf")

    trainer._give = overflow
    trainer.train()
    assert trainer._skipped == 1 and same(ZOTrainer.replay(make_model(), tmp_path), trainer.model)


def test_logs_of_optimizers_of_ones_own(tmp_path, caplog):
    class Adam(ZOTrainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return torch.optim.Adam, dict(lr=0.01)

    with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
        make_trainer(tmp_path, cls=Adam, max_steps=1).train()
    assert "optimizer of its own" in caplog.text
    with pytest.raises(ValueError, match="optimizer of its own"):
        ZOTrainer.replay(make_model(), tmp_path)


def test_logs_that_were_cut(tmp_path):
    """Known before the first step is made."""
    make_trainer(tmp_path, max_steps=3).train()
    log = tmp_path / "zo_replay.jsonl"
    text = log.read_text()
    for cut in (text[:-9], text[: text.rindex('"lr"')], text.replace('"c": "', '"c": "x')):
        log.write_text(cut)
        with pytest.raises(ValueError, match="log: .*zo_replay.jsonl"):
            ZOTrainer.replay(make_model(), tmp_path)
