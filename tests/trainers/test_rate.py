"""Rate-constrained training: the step by itself, and through Trainer."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_rnn import (
    GRUConfig,
    GRUForCausalLM,
    NonFiniteLossError,
    RateCallback,
    RateConstrainedConfig,
    RateConstrainedTrainer,
    compress,
)
from hf_rnn_kernels.coding import GeneralizedGaussian, dequantize, quantize
from hf_rnn_trainers.rate import RateSettings
from hf_rnn_trainers.rate.rate_step import fit, moments, published_step, shrink

TOKENS = dict(vocab_size=17, pad_token_id=None, bos_token_id=None, eos_token_id=None)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "logged" not in request.node.name:
        monkeypatch.setattr("hf_rnn_trainers.rate.rate_callback.draw_rate", lambda *_: None)


def make_model(seed: int = 0) -> GRUForCausalLM:
    torch.manual_seed(seed)
    return GRUForCausalLM(
        GRUConfig(hidden_size=16, num_hidden_layers=1, block_layout="paper", initializer_range=0.2, **TOKENS)
    )


def make_data(count: int = 64) -> Dataset:
    rows = np.random.default_rng(0).integers(0, 17, (count, 9)).cumsum(1) % 17
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def arguments(folder, **settings) -> dict:
    common = dict(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=10)
    return common | dict(save_strategy="no", max_steps=10, learning_rate=1e-2, per_device_train_batch_size=8) | settings


def make_trainer(folder, model=None, callbacks=None, **settings) -> RateConstrainedTrainer:
    args = RateConstrainedConfig(**arguments(folder, **settings))
    data = make_data()
    model = make_model() if model is None else model
    return RateConstrainedTrainer(model, args, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(a, b) -> None:
    for (name, x), y in zip(weights(a).items(), weights(b).values(), strict=True):
        assert torch.equal(x, y), name


class TestStep:
    def test_equation(self):
        """In float64, weight by weight; what is within its step of zero becomes exactly zero."""
        w = torch.randn(300, dtype=torch.float64) * 0.1
        nu, r, size, eps = 0.6, 0.1, 0.02, 0.05
        expected = []
        for x in w.tolist():
            s = size * nu * (abs(x) / r + eps) ** (nu - 1)
            expected.append(np.sign(x) * max(abs(x) - s, 0.0))
        expected = torch.tensor(expected, dtype=torch.float64)
        expected *= w.norm() / expected.norm()
        shrink([w], [(nu, r)], [size], eps)
        torch.testing.assert_close(w, expected, rtol=0, atol=1e-15)
        assert (w == 0).sum() > 10

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        """Zeros stay zeros, and the norm is kept as far as the dtype can."""
        zeros, w = torch.zeros(4, 4, dtype=dtype), (torch.randn(64, 64) * 0.01).to(dtype)
        norm = w.float().norm()
        for _ in range(20):
            shrink([zeros, w], [(1.0, 0.0), (0.7, 0.01)], [1e-2, 1e-4], 0.1)
        assert not zeros.any()
        assert w.float().norm() == pytest.approx(float(norm), rel=0.02 if dtype == torch.float16 else 0.1)

    @pytest.mark.parametrize("nu", [0.3, 1.0, 1.9])
    def test_compiled(self, nu):
        """Large tensors by one loop: as the equation in float64."""
        w = torch.randn(300, 301)
        expected = w.double()
        step = 0.1 * nu * (expected.abs() / 0.7 + 0.1) ** (nu - 1)
        left = expected.sign() * (expected.abs() - step).clamp(min=0)
        shrink([w], [(nu, 0.7)], [0.1], 0.1)
        torch.testing.assert_close(w.double(), left * expected.norm() / left.norm(), rtol=1e-5, atol=1e-6)

    def test_too_much_is_not_made_up_for(self):
        """What is left grows by a factor of two a step at most."""
        w = torch.randn(1000)
        largest = w.abs().max()
        shrink([w], [(1.0, 1.0)], [3.0], 0.1)
        assert w.count_nonzero() < 20 and w.abs().max() <= 2 * largest

    def test_published(self):
        w = torch.randn(50, dtype=torch.float64)
        expected = w - 3.0 * 0.7 / 1000 * w.sign() * (w.abs() + 1) ** (0.7 - 1)
        published_step([w], 0.7, 3.0, 1000)
        torch.testing.assert_close(w, expected)

    def test_shapes_by_tensor_and_of_all(self):
        a, b = torch.randn(100, 100), torch.distributions.Laplace(0.0, 0.1).sample((50, 200))
        sums = moments([a, b])
        one, other = fit(sums, "tensor")
        assert one[0] == pytest.approx(2, abs=0.15) and other[0] == pytest.approx(1, abs=0.1)
        assert one[1] == pytest.approx(float(a.square().mean().sqrt()))
        every = fit(sums, "global")
        assert every[0] == every[1]
        assert every[0][0] == pytest.approx(GeneralizedGaussian.fit(torch.cat([a.flatten(), b.flatten()])).shape)


class TestTrainer:
    def test_without_a_multiplier_it_is_the_stock_trainer(self, tmp_path):
        """Bit for bit, the last share included."""
        ours, stock = make_model(), make_model()
        make_trainer(tmp_path / "a", ours, rate_shrink=0.0).train()
        Trainer(stock, TrainingArguments(**arguments(tmp_path / "b")), train_dataset=make_data()).train()
        assert_equal(ours, stock)

    def test_zeros_are_exact_and_stay(self, tmp_path):
        found = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                found.append(
                    {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1 and "norm" not in name}
                )

        make_trainer(tmp_path, callbacks=[Watch()], rate_shrink=1.0, max_steps=20, rate_finetune=0.5).train()
        at_the_turn = found[9]
        assert 0.02 < np.mean([float(z.float().mean()) for z in at_the_turn.values()]) < 0.95
        for later in found[10:]:
            for name, zeros in at_the_turn.items():
                assert later[name][zeros].all(), name

    @pytest.mark.parametrize("settings", [dict(rate_finetune=1.0, rate_warmup=0.0), dict(rate_shrink=0.0)])
    def test_what_begins_at_zero_trains(self, settings, tmp_path):
        """As the B of an adapter does: only zeros that the rate made stay."""
        model = make_model()
        weight = model.model.layers[0].mixer.out_proj.weight
        with torch.no_grad():
            weight.zero_()
        make_trainer(tmp_path, model, max_steps=1, **{"rate_finetune": 1.0, "rate_warmup": 0.0} | settings).train()
        assert (weight != 0).any()

    def test_more_rate_fewer_bits(self, tmp_path):
        bits = []
        for i, rate in enumerate((0.0, 1.0, 5.0)):
            trainer = make_trainer(tmp_path / str(i), rate_shrink=rate, rate_step=2.0**-6, max_steps=20)
            trainer.train()
            bits.append(trainer.rate.coded_bits())
        assert bits[0] > bits[1] + 0.05 > bits[2] + 0.3

    def test_excluded(self, tmp_path):
        """Vectors, and what the pattern names, move as they do without a rate."""
        model = make_model()
        trainer = make_trainer(tmp_path, model, rate_exclude="lm_head|norm", rate_shrink=5.0, max_steps=12)
        trainer.train()
        assert not (model.lm_head.weight == 0).any()
        assert all(not (p == 0).any() for name, p in model.named_parameters() if name.endswith("bias") and p.dim() == 1)
        assert (model.model.layers[0].mixer.recurrent_weight == 0).any()

    def test_what_is_logged(self, tmp_path):
        trainer = make_trainer(tmp_path, rate_shrink=0.5, logging_steps=5)
        trainer.train()
        entry, last = (e for e in trainer.state.log_history if "loss" in e)
        names = {"rate_shape", "estimated_bits", "coded_bits", "zeros", "rate_multiplier", "paper_lambda"}
        assert names <= set(entry)
        assert entry["estimated_bits"] == pytest.approx(entry["coded_bits"], abs=0.7)
        assert 0 < entry["zeros"] < 1 and entry["paper_lambda"] > 0
        assert last["paper_lambda"] == 0  # in the last share of the steps
        assert (tmp_path / "rate.png").stat().st_size > 10_000

    def test_another_training_begins_anew(self, tmp_path):
        """With the same trainer, or with a callback that served another model and was interrupted."""
        settings = dict(target_bits=2.0, rate_every=2)
        trainer = make_trainer(tmp_path / "a", **settings)
        trainer.train()
        first = trainer.rate.multiplier
        trainer.model.load_state_dict(make_model().state_dict())
        trainer.train()
        assert trainer.rate.multiplier == first
        callback = RateCallback(quantization_aware=True, rate_finetune=1.0, rate_warmup=0.0)
        models = make_model(0), make_model(1)
        for i, model in enumerate(models):
            args = TrainingArguments(**arguments(tmp_path / f"b{i}", learning_rate=0.0, max_steps=1))
            stock = Trainer(model, args, train_dataset=make_data(), callbacks=[callback])
            if i == 0:
                stock.compute_loss = lambda *args, **kwargs: 1 / 0
                with pytest.raises(ZeroDivisionError):
                    stock.train()
            else:
                stock.train()
        assert_equal(models[0], make_model(0))
        for name, p in models[1].named_parameters():  # ended where it should: on the grid
            own = dict(make_model(1).named_parameters())[name]
            coded = name in callback._parameters
            expected = dequantize(quantize(own, callback.step_exponent, 0.1), callback.step_exponent) if coded else own
            assert torch.equal(p, expected), name

    def test_callbacks_restored_from_a_checkpoint(self, tmp_path):
        settings = dict(restore_callback_states_from_checkpoint=True, save_strategy="steps", save_steps=5)
        whole = make_trainer(tmp_path / "a", **settings)
        whole.log({"loss": 1.0})  # before training there is nothing to say of weights
        whole.train()
        again = make_trainer(tmp_path / "b", make_model(3), **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
        assert_equal(whole.model, again.model)

    def test_several_evaluation_sets(self, tmp_path):
        settings = dict(max_loss_increase=0.01, reference_loss=1.0, eval_strategy="steps", eval_steps=2)
        trainer = make_trainer(tmp_path, **settings)
        trainer.eval_dataset = {"a": make_data(), "b": make_data()}
        with pytest.raises(ValueError, match="max_loss_increase: .*eval_a_loss"):
            trainer.train()
        args = TrainingArguments(**arguments(tmp_path))
        stock = Trainer(make_model(), args, train_dataset=make_data(), callbacks=[RateCallback(max_loss_increase=0.1)])
        with pytest.raises(ValueError, match="eval_strategy"):
            stock.train()
        args.eval_strategy = "epoch"
        with pytest.raises(ValueError, match="reference_loss"):
            stock.train()

    @pytest.mark.parametrize(
        "settings",
        [
            dict(target_bits=3.0),
            dict(quantization_aware=True, rate_finetune=0.4),
            dict(max_loss_increase=0.01, eval_strategy="steps", eval_steps=2, eval_on_start=True),
        ],
    )
    @pytest.mark.slow
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_resume_is_exact(self, settings, accumulate, tmp_path):
        settings |= dict(rate_shrink=0.5, rate_every=3, rate_step=2.0**-5, gradient_accumulation_steps=accumulate)
        settings |= dict(save_strategy="steps", save_steps=7, max_steps=12, per_device_train_batch_size=4)
        whole = make_trainer(tmp_path / "a", **settings)
        whole.train()
        again = make_trainer(tmp_path / "b", make_model(3), **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
        assert_equal(whole.model, again.model)
        assert whole.rate.multiplier == again.rate.multiplier

    @pytest.mark.parametrize("aware", [False, True])
    def test_bits_are_reached(self, aware, tmp_path):
        """Within 3%; and where training was in quantised weights, they are coded without a loss."""
        settings = dict(target_bits=3.0, rate_every=2, rate_shrink=0.5, rate_step=2.0**-4, quantization_aware=aware)
        trainer = make_trainer(tmp_path, max_steps=100, lr_scheduler_type="constant", logging_steps=1, **settings)
        trainer.train()
        history = [e["coded_bits"] for e in trainer.state.log_history if "coded_bits" in e]
        assert history[0] > 3.3
        assert trainer.rate.coded_bits() == pytest.approx(3.0, rel=0.03)
        if aware:
            before, loss = weights(trainer.model), trainer.evaluate()["eval_loss"]
            compress(trainer.model, step=trainer.rate.step, rate=0.0)
            assert trainer.evaluate()["eval_loss"] == loss
            for name, p in weights(trainer.model).items():
                assert torch.equal(p, before[name]), name

    def test_a_bound_on_the_loss_steers(self, tmp_path):
        """Too much of a rise, and the multiplier goes down; else up."""
        for reference, direction in ((0.01, -1), (100.0, 1)):
            settings = dict(max_loss_increase=0.01, reference_loss=reference, eval_strategy="steps", eval_steps=2)
            trainer = make_trainer(tmp_path, **settings)
            trainer.train()
            assert direction * np.log(trainer.rate.multiplier) > 1

    def test_the_first_evaluation_is_the_reference(self, tmp_path):
        settings = dict(max_loss_increase=0.01, eval_on_start=True, eval_strategy="steps", eval_steps=5)
        trainer = make_trainer(tmp_path, **settings)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.rate.reference_loss == pytest.approx(before)

    def test_the_paper_s_multiplier(self, tmp_path):
        """lambda nu / N would shrink every weight by as much as the step did a root mean square one."""
        settings = dict(rate_shrink=0.5, rate_warmup=0.0, max_steps=2, logging_steps=1, lr_scheduler_type="constant")
        trainer = make_trainer(tmp_path, rate_finetune=0.5, rate_epsilon=0.25, **settings)
        trainer.train()
        first, last = (e["paper_lambda"] for e in trainer.state.log_history if "loss" in e)
        counts = [p.numel() for p in trainer.rate._parameters.values()]
        steps = [0.01 * 0.5 * nu * 1.25 ** (nu - 1) for nu, _ in trainer.rate.fits]
        assert first == pytest.approx(
            sum(n * s / nu for n, s, (nu, _) in zip(counts, steps, trainer.rate.fits, strict=True))
        )
        assert last == 0

    def test_published_preset(self, tmp_path):
        """Every step, by one shape of all weights; no zeros, and the multiplier is 2,000 / N, at any learning rate."""
        model = make_model()
        before = weights(model)
        trainer = make_trainer(tmp_path, model, paper_preset=True, learning_rate=0.0, max_steps=1, rate_finetune=0.0)
        trainer.train()
        constrained = {name: before[name] for name in trainer.rate._parameters}
        count = sum(w.numel() for w in constrained.values())
        nu = GeneralizedGaussian.fit(torch.cat([w.flatten() for w in constrained.values()])).shape
        for name, w in constrained.items():
            expected = w - 2000 / count * nu * w.sign() * (w.abs() + 1) ** (nu - 1)
            torch.testing.assert_close(weights(model)[name], expected)

    def test_quantised_forward(self, tmp_path):
        """In the last share the loss is that of quantised weights, and training ends with them; between steps the
        weights are the real ones."""
        model, seen, between = make_model(), [], []

        def on_grid() -> bool:
            return all((p * 8 == (p * 8).round()).all() for p in trainer.rate._parameters.values())

        model.register_forward_pre_hook(lambda *_: seen.append(on_grid()))
        settings = dict(quantization_aware=True, rate_step=2.0**-3, rate_finetune=0.5, gradient_accumulation_steps=2)

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                between.append(on_grid())

        settings |= dict(callbacks=[Watch()], max_steps=6, per_device_train_batch_size=4)
        trainer = make_trainer(tmp_path, model, **settings)
        trainer.train()
        assert seen == [False] * 6 + [True] * 6 and between == [False] * 6
        assert on_grid()

    def test_a_failing_step_leaves_the_real_weights(self, tmp_path):
        model = make_model()
        settings = dict(quantization_aware=True, rate_step=2.0**-3, rate_finetune=1.0, rate_warmup=0.0)
        trainer = make_trainer(tmp_path, model, **settings)
        before = weights(model)
        trainer.compute_loss = lambda model, inputs, **kwargs: model(**inputs).loss * float("nan")
        with pytest.raises(NonFiniteLossError):
            trainer.train()
        for name, p in weights(model).items():
            assert torch.equal(p, before[name]), name

    def test_adapters(self, tmp_path):
        """Only what trains: the base stays as it is."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        base = LlamaForCausalLM(LlamaConfig(**sizes, **TOKENS))
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        before = weights(model)
        trainer = make_trainer(tmp_path, model, rate_shrink=0.5)
        trainer.train()
        assert set(trainer.rate._parameters) == {name for name in before if "lora_" in name}
        for name, p in weights(model).items():
            assert ("lora_" in name) != torch.equal(p, before[name]), name


def test_as_a_callback(tmp_path):
    """In the stock Trainer: the same weights as the package's trainer."""
    ours, theirs = make_model(), make_model()
    make_trainer(tmp_path / "a", ours, rate_shrink=0.5).train()
    stock = Trainer(
        theirs,
        TrainingArguments(**arguments(tmp_path / "b")),
        train_dataset=make_data(),
        callbacks=[RateCallback(rate_shrink=0.5)],
    )
    stock.train()
    assert_equal(ours, theirs)
    assert any("coded_bits" in entry for entry in stock.state.log_history)


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(rate_shrink=-1.0), "rate_shrink"),
        (dict(rate_epsilon=0.0), "rate_epsilon"),
        (dict(rate_scope="layer"), "rate_scope"),
        (dict(rate_every=0), "rate_every"),
        (dict(rate_warmup=0.7, rate_finetune=0.5), "rate_warmup, rate_finetune"),
        (dict(rate_step=0.3), "rate_step.*power of two"),
        (dict(rate_step=-0.5), "rate_step"),
        (dict(target_bits=2.0, max_loss_increase=0.1), "give one"),
        (dict(target_bits=0.0), "target_bits"),
        (dict(target_bits=1.0, rate_shrink=0.0), "rate_shrink"),
        (dict(quantization_aware=True, rate_finetune=0.0), "quantization_aware"),
        (dict(rate_exclude="("), "rate_exclude"),
        (dict(rate_warmup=float("nan")), "rate_warmup"),
        (dict(paper_preset=True, target_bits=2.0), "paper_preset"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        RateSettings(**settings)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="eval_strategy"):
        RateConstrainedConfig(**arguments(tmp_path, max_loss_increase=0.1))
    with pytest.raises(ValueError, match="reference_loss"):
        RateConstrainedConfig(**arguments(tmp_path, max_loss_increase=0.1, eval_strategy="epoch"))
    with pytest.raises(TypeError, match="args"):
        RateConstrainedTrainer(make_model(), TrainingArguments(**arguments(tmp_path)))
    with pytest.raises(ValueError, match="leaves no matrix"):
        make_trainer(tmp_path, rate_exclude=".").train()
