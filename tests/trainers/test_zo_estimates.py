"""What ZOTrainer estimates, against gradients in float64."""

import copy
import math

import pytest
import torch
from conftest import ARCHITECTURES, relative_error

from hf_rnn import LSTMConfig, LSTMForCausalLM, ZOConfig, ZOTrainer
from hf_rnn_trainers.zo.estimators import estimate
from hf_rnn_trainers.zo.evaluation import call_with, moved, perturbed, stream_losses
from hf_rnn_trainers.zo.optimizer import written_out


def lstm(seed=0, **settings):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=16, hidden_size=26, num_hidden_layers=1, feed_forward_factor=0)
    sizes |= dict(block_layout="paper", initializer_range=0.02)
    tokens = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return LSTMForCausalLM(LSTMConfig(**sizes | tokens | settings)).double()


def trainer_for(model, folder, cls=ZOTrainer, **settings):
    return cls(model, ZOConfig(**dict(output_dir=str(folder), report_to="none", use_cpu=True, seed=3) | settings))


def a_batch(rows=2, time=6, vocabulary=16):
    ids = torch.randint(0, vocabulary, (rows, time), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


def scalars(trainer, inputs, step=5):
    return trainer._estimate(trainer._means(trainer._losses(inputs, step)))


def estimated(trainer, c, step=5):
    return torch.cat([written_out(parts).flatten() for _, parts in trainer.directions.combine(step, c)])


def delta(trainer, step, j):
    """A direction, written out."""
    directions = trainer.directions
    return torch.cat([directions.dense(name, step, j).flatten() for name in directions.parameters]).double()


def gradient(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "kind, n",
    [("low_rank", 96), ("low_rank", 512), pytest.param("rademacher", 96, marks=pytest.mark.slow)]
    + [pytest.param("low_rank", 2048, marks=pytest.mark.exhaustive)]
    + [pytest.param("rademacher", n, marks=pytest.mark.exhaustive) for n in (512, 2048)]
    + [pytest.param("gaussian", n, marks=pytest.mark.exhaustive) for n in (96, 512)],
)
def test_cosine_law(kind, n, tmp_path):
    """E cos(g^, g) = sqrt(n / (n + d - 1)) and E |g^|^2 = |g|^2 (1 + (d - 1) / n), 8 seeds."""
    cosines, norms, inputs = [], [], a_batch(1, 5)
    for seed in range(8):
        model = lstm(seed)
        trainer = trainer_for(model, tmp_path, num_directions=n, epsilon=1e-4, directions=kind, seed=seed)
        found, exact = estimated(trainer, scalars(trainer, inputs)), gradient(model, inputs)
        cosines.append(float(found @ exact / found.norm() / exact.norm()))
        norms.append(float(found.norm() / exact.norm()) ** 2)
    d = trainer.directions.size
    assert 6_500 < d < 7_500
    assert abs(sum(cosines) / 8 / math.sqrt(n / (n + d - 1)) - 1) < 0.1
    assert abs(sum(norms) / 8 / (1 + (d - 1) / n) - 1) < 0.1


@pytest.mark.parametrize("kind", ["low_rank", "rademacher", "gaussian", "sparse"])
def test_unbiased(kind, tmp_path):
    """The mean of g^ . g / |g|^2 over R estimates of n is within 3 sqrt(3 / (n R)) of 1 (of a loss that is linear)."""
    model, inputs = lstm(hidden_size=8), a_batch()
    exact = gradient(model, inputs)
    trainer = trainer_for(model, tmp_path, directions=kind)
    repeats, n, total = 20, 16, 0.0
    for step in range(repeats):
        deltas = []
        for j in range(n):
            deltas.append(
                torch.cat([trainer.directions.dense(k, step, j).flatten() for k in trainer.directions.parameters])
            )
        deltas = torch.stack(deltas).double()
        total += float(estimated(trainer, deltas @ exact / n, step).double() @ exact / exact.square().sum())
    assert abs(total / repeats - 1) < 3 * math.sqrt(3 / (n * repeats))


@pytest.mark.parametrize("estimator, slope", [("cd", 2), ("fd", 1)])
def test_order(estimator, slope, tmp_path):
    """The error of a scalar against the exact directional derivative over epsilon."""
    model, inputs, errors = lstm(), a_batch(), []
    exact = gradient(model, inputs)
    for epsilon in (2e-3, 2e-4):
        trainer = trainer_for(model, tmp_path, estimator=estimator, num_directions=8, epsilon=epsilon)
        derivative = torch.stack([delta(trainer, 5, j) for j in range(8)]) @ exact
        errors.append((8 * scalars(trainer, inputs).double() - derivative).abs().mean())
    assert abs(math.log10(errors[0] / errors[1]) - slope) < 0.2


@pytest.mark.parametrize("rank", [1, 3])
def test_many_at_once_or_alone(architecture, make_model, rank, tmp_path):
    """Losses of 6 directions, both signs, in one forward pass, in groups, and with W + eps delta written out."""
    model, inputs = make_model(), a_batch(2, 13, 58)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 9:] = 0
    inputs["labels"] = inputs["labels"].where(inputs["attention_mask"] == 1, -100)
    settings = dict(num_directions=6, rank=rank, epsilon=0.03)
    together = trainer_for(model, tmp_path, directions_per_forward=6, **settings)
    losses = together._means(together._losses(inputs, 5))
    assert losses.std() > 1e-3
    in_groups = trainer_for(model, tmp_path, directions_per_forward=4, chunk_size=5, **settings)
    torch.testing.assert_close(in_groups._means(in_groups._losses(inputs, 5)), losses, rtol=1e-5, atol=0)
    for j, sign in ((0, 1), (5, -1)):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in changed.named_parameters():
                p += sign * 0.03 * together.directions.dense(name, 5, j)
            expected = changed(**inputs).loss.double()
        torch.testing.assert_close(losses[j, (1 - sign) // 2], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("evaluation", ["functional", "snapshot"])
@pytest.mark.parametrize("kind", ["low_rank", "gaussian"])
def test_weights_are_left_alone(kind, evaluation, dtype, tmp_path):
    """Before, after, and after an exception or a NaN."""
    model, inputs = lstm().to(dtype), a_batch()
    before = [p.clone() for p in model.parameters()]

    class Failing(ZOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            assert not torch.equal(model.lm_head.weight + 0, before[-1])
            if self.forward_passes == 3:
                raise KeyboardInterrupt
            return float("nan") if self.forward_passes == 2 else model(**inputs).loss

    settings = dict(directions=kind, evaluation=evaluation, num_directions=4, epsilon=0.1)
    trainer_for(model, tmp_path, **settings)._losses(inputs, 0)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, tmp_path, cls=Failing, **settings)._losses(inputs, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_in_place_drifts_little(tmp_path):
    model, inputs = lstm().float(), a_batch()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    settings = dict(directions="rademacher", num_directions=64, epsilon=1e-3)
    losses = trainer_for(model, tmp_path, evaluation="in_place", **settings)._losses(inputs, 0)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert 0 < relative_error(after, before) < 1e-5
    torch.testing.assert_close(losses, trainer_for(model, tmp_path, **settings)._losses(inputs, 0), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="in_place drifts in torch.bfloat16"):
        trainer_for(model.bfloat16(), tmp_path, evaluation="in_place")


def test_dropout_is_off(tmp_path):
    model, inputs = lstm(hidden_dropout=0.5).train(), a_batch()
    trainer = trainer_for(model, tmp_path, num_directions=2)
    trainer._losses(inputs, 0)
    first, second = (trainer._losses_of(inputs, 0, [(0, 0)]) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("architecture_settings", [dict(hidden_size=8)])
def test_steps_on_a_linear_loss(architecture_settings, tmp_path):
    """They do not depend on epsilon, and are proportional to the learning rate."""
    vector = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Linear(ZOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            flat = torch.cat([p.flatten() for p in model.parameters()])
            return float(flat @ vector[: len(flat)])

    found = []
    for epsilon in (1e-3, 1e-1):
        trainer = trainer_for(lstm(**architecture_settings), tmp_path, cls=Linear, epsilon=epsilon, num_directions=8)
        c = scalars(trainer, a_batch(), 0)
        found.append(estimated(trainer, c, 0))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    expected = sum((vector[: len(x)] @ x) * x for x in (delta(trainer, 0, j) for j in range(8))) / 8
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_data_per_direction(tmp_path):
    model, inputs = lstm(), a_batch(8, 7)
    for estimator in ("cd", "fd"):
        settings = dict(num_directions=4, per_device_train_batch_size=8, estimator=estimator)
        own = trainer_for(model, tmp_path, data_per_direction=True, **settings)
        means = own._means(own._losses(inputs, 5))
        for j in range(4):
            part = {name: x[2 * j : 2 * j + 2] for name, x in inputs.items()}
            alone = trainer_for(model, tmp_path, **settings)
            torch.testing.assert_close(means[j], alone._means(alone._losses(part, 5))[j], rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="multiple of 5 rows"):
        trainer_for(model, tmp_path, data_per_direction=True, num_directions=5, per_device_train_batch_size=8)


def test_formulas():
    plus, minus, clean = (torch.tensor(x, dtype=torch.float64) for x in ([1.5, 2.0, 3.0], [1.0, 2.5, 3.0], [1.0] * 3))
    pair, three = torch.stack([plus, minus], 1), torch.stack([plus, minus, clean], 1)
    expect = {
        "cd": [0.5 / 0.2, -0.5 / 0.2, 0.0],
        "es_sign": [1.0, -1.0, 0.0],
        "es_rank": [1 / 4, -1 / 4, 0.0],
    }
    for name, c in expect.items():
        torch.testing.assert_close(estimate(name, pair, 0.1, 0.1), torch.tensor(c) / 3)
    forward = estimate("fd", torch.stack([plus, clean], 1), 0.1, 0.1)
    torch.testing.assert_close(forward, torch.tensor([0.5, 1.0, 2.0]) / 0.1 / 3)
    damped = [0.5 / 0.2 / 50**0.5, -0.5 / 0.2 / 250**0.5, 0.0]
    torch.testing.assert_close(estimate("spsa15", three, 0.1, 0.5), torch.tensor(damped) / 3)
    gentle = torch.stack([plus, 2 - plus, clean], 1)  # no curvature, no damping
    torch.testing.assert_close(estimate("spsa15", gentle, 0.1, 0.5), estimate("cd", gentle[:, :2], 0.1, 0.5))


def test_losses_that_are_not_finite_are_dropped():
    losses = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0], [4.0, 2.0]], dtype=torch.float64)
    for name in ("cd", "es_sign", "es_rank"):
        c = estimate(name, losses, 0.5, 0.1)
        assert c[1] == c[2] == 0
        torch.testing.assert_close(c[[0, 3]], estimate(name, losses[[0, 3]], 0.5, 0.1))
    assert (estimate("cd", losses[1:3], 0.5, 0.1) == 0).all()


def test_memory_parts(tmp_path):
    """Chunks of time and of logits change no loss."""
    model, inputs = lstm(), {name: x[None] for name, x in a_batch(3, 40).items()}
    with torch.no_grad():
        whole, count = stream_losses(model, inputs, 512)
        torch.testing.assert_close(whole / count, model(**{k: x[0] for k, x in inputs.items()}).loss[None].double())
        for chunk in (1, 7, 39):
            torch.testing.assert_close(stream_losses(model, inputs, chunk)[0], whole)


def test_a_model_of_someone_else(tmp_path):
    """transformers' GPT-2, a direction at a time, with tied weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=32, n_embd=8, n_layer=1, n_head=2)).eval()
    inputs = a_batch()
    for kind in ("low_rank", "rademacher"):
        trainer = trainer_for(model, tmp_path, num_directions=2, epsilon=0.1, directions=kind)
        losses = trainer._means(trainer._losses(inputs, 5))
        with moved(trainer.directions, 5, (1, -1), 0.1, in_place=False), torch.no_grad():
            torch.testing.assert_close(losses[1, 1], model(**inputs).loss.double(), rtol=1e-6, atol=0)
        parameters = perturbed(trainer.directions, 5, [(0, 1)], 0.1)
        value = call_with(model, parameters, lambda: float(model(**inputs).loss))
        assert abs(value - losses[0, 0]) < 1e-6


def test_every_architecture_is_here():
    assert all(model.supports_perturbed for _, model, _ in ARCHITECTURES.values())
