"""ZOTrainer as a Trainer: runs, resumes, replays, on objectives of all kinds, and refuses what it cannot do."""

import json
import logging

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from zo_runs import DEFAULTS, make_data, make_model, make_trainer, same

from hf_rnn import MinGRUConfig, MinGRUForCausalLM, NonFiniteLossError, ZOConfig, ZOTrainer


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(estimator="fd"),
        dict(estimator="spsa15"),
        dict(estimator="es_sign", learning_rate=0.02),
        dict(estimator="es_rank", learning_rate=0.02),
        pytest.param(dict(directions="sparse", num_directions=24), marks=pytest.mark.slow),
        pytest.param(dict(directions="gaussian"), marks=pytest.mark.slow),
        dict(rank=2, lr_scheduler_type="cosine", weight_decay=0.01),
        dict(optim="adamw_torch", learning_rate=0.01),
        dict(gradient_accumulation_steps=2, per_device_train_batch_size=4),
        dict(data_per_direction=True, per_device_train_batch_size=64, learning_rate=0.1),
        pytest.param(dict(evaluation="in_place", directions="rademacher"), marks=pytest.mark.slow),
        dict(max_grad_norm=1.0),
        dict(bf16=True, epsilon=0.1),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "default",
)
def test_trains(settings, tmp_path):
    """Every kind lowers the loss of its batch."""
    data = make_data(4)
    if "data_per_direction" in settings:
        data = concatenate_datasets([data] * 16)
    trainer = make_trainer(tmp_path, data=data, **dict(max_steps=40, logging_steps=4) | settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.05
    assert {"zero_differences", "dropped_directions", "forward_passes", "grad_norm"} <= set(
        trainer.state.log_history[0]
    )


def test_estimates_the_gradient_norm(tmp_path):
    model, data = make_model(), make_data(4)
    settings = dict(num_directions=512, learning_rate=0.0, epsilon=1e-3, max_steps=1, logging_steps=1)
    trainer = make_trainer(tmp_path, model, data=data, **settings)
    trainer.train()
    model(**data[:]).loss.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert abs(trainer.state.log_history[0]["grad_norm"] / exact - 1) < 0.15


def test_seed_mode_is_sgd(tmp_path):
    """Without gradients in memory: the same steps as torch's SGD on written-out estimates."""
    seeded = make_trainer(tmp_path, weight_decay=0.1)
    seeded.train()
    assert all(p.grad is None for p in seeded.model.parameters())
    model = make_model()
    decay = [p for name, p in model.named_parameters() if name in seeded.get_decay_parameter_names(model)]
    rest = [p for name, p in model.named_parameters() if name not in seeded.get_decay_parameter_names(model)]
    groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
    args = seeded.args
    written = ZOTrainer(
        model, args, train_dataset=make_data(), optimizers=(torch.optim.SGD(groups, lr=args.learning_rate), None)
    )
    written.train()
    for a, b in zip(seeded.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_accumulation_accumulates_scalars(tmp_path):
    """Two batches of 2 take the step of one batch of 4, with unequal numbers of tokens."""
    ids = torch.randint(0, 16, (24, 9)).tolist()
    labels = torch.tensor(ids)
    labels[::3, 4:] = -100
    data = Dataset.from_dict({"input_ids": ids, "labels": labels.tolist()}).with_format("torch")
    whole = make_trainer(tmp_path / "a", data=data, max_steps=3)
    parts = make_trainer(
        tmp_path / "b", data=data, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    for trainer in (whole, parts):
        trainer.train()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [dict(), dict(optim="adamw_torch", learning_rate=0.01), dict(directions="rademacher", num_directions=4)]
)
def test_resume_and_replay(settings, tmp_path):
    """10 steps = 5, save, resume, 5 more, bit for bit; and the log rebuilds them from the base alone."""
    settings = settings | dict(save_strategy="steps", save_steps=5, lr_scheduler_type="linear")
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 7  # steps 5 and 6 are made again

    make_trainer(tmp_path / "parts", callbacks=[Stop()], **settings).train()
    resumed = make_trainer(tmp_path / "parts", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert same(straight.model, resumed.model)
    assert not same(straight.model, make_model())
    for folder in ("straight", "parts"):
        assert same(ZOTrainer.replay(make_model(), tmp_path / folder), straight.model)
    make_model().save_pretrained(tmp_path / "base")
    assert same(ZOTrainer.replay(tmp_path / "base", tmp_path / "straight" / "zo_replay.jsonl"), straight.model)
    assert (tmp_path / "straight" / "zo_replay.jsonl").stat().st_size < 3000


def test_replay_with_clipping(tmp_path):
    trainer = make_trainer(tmp_path, max_grad_norm=0.5)
    trainer.train()
    assert same(ZOTrainer.replay(make_model(), tmp_path), trainer.model)


def test_replay_refuses(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train()
    log = tmp_path / "zo_replay.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="step 1 where step 0 should be"):
        ZOTrainer.replay(make_model(), tmp_path)
    log.write_text(json.dumps({"size": 3}))
    with pytest.raises(ValueError, match="no replay log"):
        ZOTrainer.replay(make_model(), tmp_path)
    log.write_text("\n".join(lines))
    frozen = make_model()
    frozen.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters, as in the log"):
        ZOTrainer.replay(frozen, log)
    model, args = make_model(), trainer.args
    optimizers = (torch.optim.Adam(model.parameters()), None)
    ZOTrainer(model, args, train_dataset=make_data(), optimizers=optimizers).train()
    with pytest.raises(ValueError, match="optimizer of its own"):
        ZOTrainer.replay(make_model(), tmp_path)


def test_frozen_and_tied(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, feed_forward_factor=0, tie_word_embeddings=True)
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = MinGRUForCausalLM(MinGRUConfig(**sizes, **tokens))
    frozen = model.model.layers[0].mixer.in_proj.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    make_trainer(tmp_path, model).train()
    assert torch.equal(frozen, before["model.layers.0.mixer.in_proj.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


class Accuracy(ZOTrainer):
    """Share of next tokens that are not the likeliest: a step function of the weights."""

    def compute_loss(self, model, inputs, **kwargs):
        best = model(inputs["input_ids"]).logits[:, :-1].argmax(-1)
        return float((best != inputs["labels"][:, 1:]).float().mean())


class Reward(ZOTrainer):
    """Generated tokens that are not token 7; sampled, with the same random numbers for every direction."""

    def compute_loss(self, model, inputs, **kwargs):
        tokens = model.generate(inputs["input_ids"][:, :2], max_new_tokens=6, min_new_tokens=6, do_sample=True)
        return float((tokens[:, 2:] != 7).float().mean())


@pytest.mark.parametrize("cls", [Accuracy, pytest.param(Reward, marks=pytest.mark.slow)])
def test_objectives_without_gradients(cls, tmp_path):
    settings = dict(
        max_steps=16, num_directions=32, epsilon=0.3, estimator="es_sign", learning_rate=0.6, logging_steps=2
    )
    trainer = make_trainer(tmp_path, make_model(), cls, data=make_data(4), **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05


def test_nobodys_generator_moves(tmp_path):
    trainer = make_trainer(tmp_path, cls=Reward, num_directions=2)
    inputs = next(iter(trainer.get_train_dataloader()))
    before = torch.get_rng_state()
    first, again = (trainer._losses(inputs, 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)


class Poisoned(ZOTrainer):
    """NaN for one direction, or for all in step 3."""

    everywhere = False

    def compute_loss(self, model, inputs, **kwargs):
        loss = float(model(**inputs).loss)
        which = (self.forward_passes - 1) // 2 % self.args.num_directions
        bad = self.state.global_step == 3 if self.everywhere else which == 5
        return float("nan") if bad else loss


def test_non_finite_losses(tmp_path):
    trainer = make_trainer(tmp_path, cls=Poisoned, num_directions=8)
    trainer.train()
    assert trainer.state.log_history[0]["dropped_directions"] == 1 / 8
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    trainer = make_trainer(tmp_path, cls=Poisoned, num_directions=2, save_strategy="steps", save_steps=2)
    trainer.everywhere = True
    with pytest.raises(NonFiniteLossError, match=r"at step 3, .*checkpoint-2"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_warns_of_differences_that_are_zero(tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    logging.getLogger("hf_rnn_trainers").propagate = True
    trainer = make_trainer(tmp_path, cls=Accuracy, epsilon=1e-7)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert trainer.state.log_history[0]["zero_differences"] > 0.9
    assert "exactly zero: epsilon=1e-07" in caplog.text


def test_search_for_a_learning_rate(tmp_path):
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    trainer = make_trainer(tmp_path, model, num_directions=128)
    rate = trainer.find_learning_rate()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert 1e-3 < rate < 10
    with pytest.raises(ValueError, match="learning_rate: none between 1e\\+02"):
        trainer.find_learning_rate(low=100.0, high=1000.0)
    searched = make_trainer(tmp_path, num_directions=128, search_learning_rate=True)
    searched.train()
    assert abs(searched.args.learning_rate / rate - 1) < 1e-3
    assert searched.state.log_history[-2]["learning_rate"] == searched.args.learning_rate
    first = searched.args.learning_rate
    searched.train()  # with the optimizer of the first time
    assert searched.args.learning_rate != first
    assert searched.state.log_history[-2]["learning_rate"] == searched.args.learning_rate
    own = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="search_learning_rate: the optimizer that was given"):
        args = ZOConfig(**DEFAULTS | dict(output_dir=str(tmp_path), search_learning_rate=True))
        ZOTrainer(model, args, train_dataset=make_data(), optimizers=(own, None))


def test_paper_preset():
    rates = [
        (1e5, 0.1, 0.5),
        (1e6, 0.1, 0.1),
        (1e7, 0.01, 0.1),
        (1e8, 0.01, 0.1),
        (1.1e9, 5e-3, 0.01),
        (4.5e9, 1e-4, 1e-3),
    ]
    for size, few, many in rates:
        for n, rate in ((96, few), (512, many)):
            args = ZOConfig.paper_preset(int(size), n, output_dir="x", use_cpu=True)
            assert args.learning_rate == args.epsilon == rate
            assert (args.num_directions, args.directions, args.estimator, args.optim) == (n, "rademacher", "cd", "sgd")
            assert args.lr_scheduler_type == "constant"
    with pytest.raises(ValueError, match="96 and 512, got 7"):
        ZOConfig.paper_preset(1000, 7)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(estimator="x"), "estimator: expected one of"),
        (dict(directions="x"), "directions: expected one of"),
        (dict(evaluation="x"), "evaluation: expected one of"),
        (dict(rank=0), "rank: expected at least 1"),
        (dict(num_directions=0), "num_directions: expected at least 1"),
        (dict(directions_per_forward=0), "directions_per_forward: expected at least 1"),
        (dict(chunk_size=0), "chunk_size: expected at least 1"),
        (dict(epsilon=0.0), "epsilon: expected a number above 0"),
        (dict(density=0.0), "density: expected a share"),
        (dict(torch_compile=True), "torch_compile"),
        (dict(fsdp="full_shard"), "fsdp"),
        (dict(data_shards=2), "data_shards: expected a divisor of 1 processes, got 2"),
    ],
)
def test_refuses_arguments(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_refuses_models_and_arguments_of_others(tmp_path):
    with pytest.raises(ValueError, match="float16 loses small updates"):
        make_trainer(tmp_path, make_model().half())
    with pytest.raises(ValueError, match="all are frozen"):
        make_trainer(tmp_path, make_model().requires_grad_(False))
    with pytest.raises(TypeError, match="args: expected a ZOConfig, got TrainingArguments"):
        ZOTrainer(make_model(), TrainingArguments(output_dir=str(tmp_path), report_to="none"))
    trainer = make_trainer(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="DataParallel"):
        trainer._refuse()


def test_evaluates_saves_and_loads(tmp_path):
    """What Trainer gives still works: evaluation, best model, checkpoints that load."""
    saving = dict(save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5, load_best_model_at_end=True)
    args = ZOConfig(**DEFAULTS | dict(output_dir=str(tmp_path)) | saving)
    trainer = ZOTrainer(make_model(), args, train_dataset=make_data(), eval_dataset=make_data(5))
    trainer.train()
    assert all(entry["eval_loss"] > 0 for entry in trainer.state.log_history if "eval_loss" in entry)
    trainer.save_model()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), trainer.model)
    stock = Trainer(trainer.model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    assert stock.evaluate(make_data(5))["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


def test_adapters(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    before = {name: p.clone() for name, p in model.named_parameters()}
    make_trainer(tmp_path, model, max_steps=2).train()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


class Own(ZOTrainer):
    """Trainer's loss, by a method of its own."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def test_tells_what_a_loss_of_ones_own_costs(tmp_path, caplog):
    for cls, settings, told in ((Own, {}, 1), (ZOTrainer, {}, 0), (Own, dict(directions="gaussian"), 0)):
        caplog.clear()
        with caplog.at_level("WARNING", logger="hf_rnn_trainers"):
            make_trainer(tmp_path, cls=cls, max_steps=1, num_directions=2, **settings).train()
        assert caplog.text.count("Own.compute_loss: directions are evaluated one after another") == told
