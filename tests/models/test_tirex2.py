"""TiRex-2: its equations, what must not change a forecast, its files, and what is refused.

That it is the `tirex-2` package's model is tested beside that, in tests/forecasting_peers.
"""

import json
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import relative_error
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import hf_rnn
from hf_rnn.cli.convert import convert
from hf_rnn.forecasting.quantiles import pinball_loss
from hf_rnn.models.tirex2.tirex_config import from_tirex_config, to_tirex_config
from hf_rnn.remote_code.bundle import write_bundle

NAN = float("nan")
P, CONTEXT, LONGEST = 4, 24, 12
SIZES = dict(hidden_size=16, num_hidden_layers=3, num_heads=2, num_slstm_heads=4, num_attention_heads=2, patch_size=P)
SIZES |= dict(context_length=CONTEXT, prediction_length=LONGEST, patch_intermediate_size=20, head_intermediate_size=24)


def make(**settings):
    """A small model whose every weight matters, in float64."""
    torch.manual_seed(0)
    model = hf_rnn.TiRex2ForPrediction(hf_rnn.TiRex2Config(**SIZES | settings)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if "recurrent_bias" in name:
                parameter.normal_()
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def walk(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(-1)


def rms(x, weight, eps=1e-6):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def heads_norm(h, weight):
    """h (H, P), each head normalised."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6).flatten() * weight


def mlstm(cell, x):
    """(L, D) to (L, D), token by token, without stabilisation."""
    q, k, v, o = cell.in_proj(x).split(cell.split, -1)
    gates = 15 * torch.tanh(cell.gate_proj(x) / 15)
    q, k, v = (y.unflatten(-1, (cell.num_heads, -1)) for y in (q, k, v))
    C, n, outputs = 0.0, 0.0, []
    for t in range(len(x)):
        i, f = gates[t, : cell.num_heads].exp(), gates[t, cell.num_heads :].sigmoid()
        C = f[:, None, None] * C + i[:, None, None] * k[t, :, :, None] * v[t, :, None, :]
        n = f[:, None] * n + i[:, None] * k[t]
        query = q[t] / q.shape[-1] ** 0.5
        h = (C * query[..., None]).sum(1) / (n * query).sum(1).abs().clamp_min(1)[:, None]
        outputs.append(cell.out_proj(o[t].sigmoid() * heads_norm(h, cell.norm.weight)))
    return torch.stack(outputs)


def slstm(cell, x):
    heads = cell.num_heads
    h, c, n = x.new_zeros(heads, x.shape[1] // heads), 0.0, 0.0
    bias, outputs = cell.recurrent_bias.view(heads, -1), []
    for token in x.unflatten(-1, (heads, -1)):
        gates = torch.einsum("hp,hgp->hg", token, cell.ifzo_proj.weight) + bias
        gates = gates + torch.einsum("hp,hgp->hg", h, cell.recurrent_weight)
        i, f, z, o = gates.chunk(4, -1)
        c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
        h = o.sigmoid() * c / n
        outputs.append(heads_norm(h, cell.norm.weight))
    return torch.stack(outputs)


def attend(attention, x, sees):
    """x (V, D) of one step of time to (V, D)."""
    q, k, v = (y.unflatten(-1, (attention.num_heads, -1)) for y in attention.in_proj(x).chunk(3, -1))
    q, k = (y / (y.square().mean(-1, keepdim=True) + torch.finfo(y.dtype).eps).sqrt() for y in (q, k))
    scores = torch.einsum("ihp,jhp->hij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return attention.out_proj(torch.einsum("hij,jhp->ihp", weights, v).flatten(1))


def by_hand(model, values, futures, targets):
    """Quantiles (V, LONGEST, Q) of one series with V rows (V, T), token by token."""
    values = torch.cat([F.pad(values, (CONTEXT - values.shape[1], 0), value=NAN), futures], 1)
    loc = values.nanmean(1, keepdim=True)
    scale = (values - loc).square().nanmean(1, keepdim=True).sqrt()
    z = ((values - loc) / scale).arcsinh().unflatten(1, (-1, P))
    x = torch.cat([z.nan_to_num(0.0), (~z.isnan()).double()], -1)

    def residual(mlp, x):
        return mlp.output_proj(F.silu(mlp.hidden_proj(x))) + mlp.skip_proj(x)

    x = residual(model.model.patch_embedding, x)
    sees = targets[:, None] | ~targets[None]
    for index, block in enumerate(model.model.layers):
        cell, scan = (block.slstm, slstm) if index == 1 else (block.mlstm, mlstm)
        for v in range(len(x)):
            u = rms(x[v], block.mixer_norm.weight)
            y = scan(cell, u)
            if not targets[v] and not futures[v].isnan().all():
                y = block.directions_proj(torch.cat([y, scan(cell, u.flip(0)).flip(0)], -1))
            y = x[v] + y
            gate, up = block.ff.up_proj(rms(y, block.ff_norm.weight)).chunk(2, -1)
            x[v] = y + block.ff.down_proj(F.silu(gate) * up)
        mixer = block.variates
        for step in range(x.shape[1]):
            y = x[:, step]
            y = y + attend(mixer.attention, rms(y, mixer.attention_norm.weight), sees)
            x[:, step] = y + mixer.mlp_down(F.silu(mixer.mlp_up(rms(y, mixer.mlp_norm.weight))))
    z = residual(model.quantile_head, rms(x, model.model.norm.weight, 1e-7))[:, -LONGEST // P - 1 : -1]
    z = z.unflatten(-1, (-1, P)).transpose(2, 3).flatten(1, 2)
    return z.sinh() * scale[..., None] + loc[..., None]


@torch.no_grad()
def test_the_equations(model):
    """Two targets, a covariate known until now and one known beforehand, with values missing; among other series."""
    values, futures = walk(4, 21), torch.full((4, LONGEST), NAN, dtype=torch.float64)
    values[0, :6], values[2, 7:9], futures[3] = NAN, NAN, walk(LONGEST)
    targets = torch.tensor([True, True, False, False])
    expected = by_hand(model, values, futures, targets)
    order = [6, 0, 4, 3, 1, 5, 2]  # of rows of three series, in one batch
    groups = torch.tensor([7, 7, 7, 7, 3, 3, 5])[order]
    values, futures = torch.cat([values, walk(3, 21, seed=2)])[order], F.pad(futures, (0, 0, 0, 3), value=NAN)[order]
    targets = F.pad(targets, (0, 3), value=True)[order]
    found = model(values, future_covariates=futures, group_ids=groups, target_mask=targets).full_predictions
    assert relative_error(found[[order.index(n) for n in range(4)]], expected) <= 1e-5  # 1e-6: the normaliser's eps


@pytest.mark.parametrize("differencing", [False, True])
def test_another_unit(model, differencing):
    """Fahrenheit or Celsius: the same forecast."""
    x = walk(4, 20) + torch.arange(4)[:, None] * torch.arange(20)
    y = model.predict(x, 9, differencing=differencing).full_predictions
    z = model.predict(1.8 * x + 32, 9, differencing=differencing).full_predictions
    assert relative_error(z, 1.8 * y + 32) <= 1e-9


def test_what_does_not_matter(model):
    """Company, order, what came before the context, missing values in front, how far the forecast goes."""
    x = walk(3, CONTEXT + 5)
    series = [x[0], x[1, 3:], x[2, 17:]]
    alone = [model.predict([one], 9).full_predictions[0] for one in series]
    together = model.predict(series[::-1], 9).full_predictions[::-1]
    small = model.predict(series, 9, batch_size=2).full_predictions
    missing = [F.pad(one, (7, 0), value=NAN) for one in series]
    longer = model.predict(missing, 9, differencing=False).full_predictions
    without = model.predict(series, 9, differencing=False).full_predictions
    for index in range(3):
        assert relative_error(together[index], alone[index]) <= 1e-9
        assert relative_error(small[index], alone[index]) <= 1e-9
        assert relative_error(longer[index], without[index]) <= 1e-9
    old = torch.cat([1e3 * torch.ones_like(x), x[:, -CONTEXT:]], 1)
    plain = model.predict(x, 9, differencing=False).full_predictions
    assert relative_error(model.predict(old, 9, differencing=False).full_predictions, plain) <= 1e-9
    assert relative_error(model.predict(x, 2, differencing=False).full_predictions, plain[:, :2]) <= 1e-9


def test_variates(model):
    """Their order does not matter; covariates do not see targets; a covariate known beforehand is read to its end."""
    x, future = walk(4, 20), walk(1, 29)
    y = model.predict(x[None, :2], 9, [x[2:]], [future]).full_predictions
    turned = model.predict(x[None, [1, 0]], 9, [x[[3, 2]]], [future]).full_predictions
    assert relative_error(turned, y[:, [1, 0]]) <= 1e-9
    later = future.clone()
    later[0, -1] += 3
    assert relative_error(model.predict(x[None, :2], 9, [x[2:]], [later]).full_predictions[:, :, 0], y[:, :, 0]) > 1e-6
    groups, targets = torch.zeros(4, dtype=torch.long), torch.tensor([True, True, False, False])
    both = [torch.cat([first, x[2:]]) for first in (x[:2], walk(2, 20, seed=5))]
    a, b = (model.model(rows, groups, targets, targets & False).last_hidden_state for rows in both)
    assert relative_error(a[2:], b[2:]) <= 1e-12 < relative_error(a[:2], b[:2])


def test_sign_flip(model):
    """With it, a forecast of the negated series is the negated forecast."""
    x = walk(2, 20) + torch.arange(2)[:, None] * torch.arange(20)
    future = walk(2, 1, 29)
    y = model.predict(x, 9, future_covariates=future, sign_flip=True).full_predictions
    negated = model.predict(-x, 9, future_covariates=-future, sign_flip=True).full_predictions
    assert relative_error(-negated.flip(-1), y) <= 1e-9
    assert relative_error(model.predict(x, 9, future_covariates=future).full_predictions, y) > 1e-3


def test_constant_and_missing_series(model):
    x = torch.stack([torch.full((20,), 5.0), torch.full((20,), NAN)]).double()
    y = model.predict(x, 9).full_predictions
    assert y.isfinite().all() and (y[0] - 5).abs().max() < 1e-5


def test_as_they_come(model):
    """Tensors, arrays and lists; one series, many, several variates; the quantiles that are asked for."""
    x = walk(2, 3, 20)
    y = model.predict(x, 5)
    assert y.full_predictions.shape == (2, 3, 5, 9) and torch.equal(y.mean_predictions, y.full_predictions[..., 4])
    array = model.predict(x.numpy(), 5, quantiles=[0.25, 0.5])
    assert isinstance(array.mean_predictions, np.ndarray) and array.full_predictions.shape == (2, 3, 5, 2)
    np.testing.assert_array_equal(array.full_predictions[..., 1], y.mean_predictions)
    one = model.predict(x[0, 0], 5).mean_predictions
    torch.testing.assert_close(one, model.predict(x[0, :1], 5).mean_predictions[0])
    first, second = model.predict([x[0].numpy(), x[1, 0]], 5).full_predictions
    assert isinstance(first, np.ndarray) and first.shape == (3, 5, 9) and second.shape == (5, 9)
    counts = model.predict(torch.arange(20), 5).mean_predictions
    assert counts.dtype == torch.float32 and counts.isfinite().all()


def test_loss():
    """In the scale that the model reads, of what is there of the targets."""
    model = make().float()
    x = walk(8, 30).float()
    past, future = x[:, :20], x[:, 20:]
    future[0, 3:] = NAN
    outputs = model(past, future, target_mask=torch.arange(8) < 6)
    scaling = model.model(F.pad(past, (4, LONGEST - P), value=NAN)).scaling
    z, wanted = (
        ((outputs.full_predictions - scaling.loc[..., None]) / scaling.scale[..., None]).arcsinh(),
        scaling.apply(future),
    )
    there = ~future.isnan() & (torch.arange(8) < 6)[:, None]
    torch.testing.assert_close(outputs.loss, pinball_loss(z, wanted, model.config.quantiles, there), rtol=1e-4, atol=0)


def test_trainer(tmp_path):
    model = make(hidden_dropout=0.1).float()
    x = (walk(8, 1) + torch.sin(torch.arange(30) / 3)).float()
    data = Dataset.from_dict({"past_values": x[:, :20].tolist(), "future_values": x[:, 20:].tolist()}).with_format(
        "torch"
    )
    arguments = hf_rnn.RecurrentTrainingArguments(
        tmp_path, max_steps=20, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = hf_rnn.RecurrentTrainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    found = trainer.predict(data)
    assert (found.label_ids == x[:, 20:].numpy()).all()
    expected = model.eval()(x[:, :20], horizon=10)
    for got, wanted in zip(found.predictions, (expected.mean_predictions, expected.full_predictions), strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted, rtol=1e-4, atol=1e-5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    trainer = hf_rnn.RecurrentTrainer(adapted, arguments, train_dataset=data, eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found.metrics["test_loss"], rel=1e-5)


def test_gradient_checkpointing():
    model, x = make(), walk(3, 20)
    arguments = dict(group_ids=torch.tensor([0, 0, 1]), future_values=walk(3, 5, seed=4))
    model(x, **arguments).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train().gradient_checkpointing_enable()
    model(x, **arguments).loss.backward()
    for name, p in model.named_parameters():
        assert name not in plain or torch.equal(p.grad, plain[name])


def test_bfloat16(model):
    x = walk(2, 20)
    low = make().bfloat16()
    assert relative_error(low.predict(x, 9).full_predictions, model.predict(x, 9).full_predictions) < 0.3


def test_fewer_bits(tmp_path):
    """Compressed, or with weights of 8 bits: nearly the same."""
    model, x = make().float(), walk(2, 20).float()
    expected = model.predict(x, 9, differencing=False).full_predictions
    model.save_pretrained(tmp_path / "plain")
    config = hf_rnn.WeightOnlyConfig(bits=8)
    packed = hf_rnn.TiRex2ForPrediction.from_pretrained(tmp_path / "plain", quantization_config=config)
    hf_rnn.save_compressed(model, tmp_path / "coded", step=2.0**-10)
    coded = hf_rnn.TiRex2ForPrediction.from_pretrained(tmp_path / "coded")
    for other in (packed, coded):
        assert 0 < relative_error(other.predict(x, 9, differencing=False).full_predictions, expected) < 0.3


def test_hidden_states(model):
    outputs = model.model(walk(2, 20), output_hidden_states=True)
    assert len(outputs.hidden_states) == 4 and outputs.hidden_states[0].shape == (2, 5, 16)


@torch.no_grad()
def test_the_last_block_computes_only_the_patches_that_are_read(model):
    x, groups = walk(3, 20), torch.tensor([0, 0, 1])
    sizes = []
    hook = model.model.layers[-1].ff.register_forward_hook(lambda module, inputs, y: sizes.append(y.shape[1]))
    read = model(x, horizon=7, group_ids=groups).full_predictions
    whole = model(x, horizon=7, group_ids=groups, output_hidden_states=True)
    hook.remove()
    assert sizes[0] < sizes[1] == whole.hidden_states[-1].shape[1]
    assert relative_error(read, whole.full_predictions) < 1e-6


def test_files(tmp_path):
    """Saved, found by the Auto classes, converted to tirex-2's names and back, under any of its names: the same."""
    model = make().float()
    x = walk(2, 20).float()
    expected = model.predict(x, 9).full_predictions
    model.save_pretrained(tmp_path / "ours")
    auto = transformers.AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / "ours")
    assert torch.equal(auto.predict(x, 9).full_predictions, expected)
    assert type(transformers.AutoModel.from_pretrained(tmp_path / "ours")) is hf_rnn.TiRex2Model
    assert convert(str(tmp_path / "ours"), tmp_path / "theirs") == "tirex-2"
    settings = json.loads((tmp_path / "theirs/config.json").read_text())
    assert "model_type" not in settings and settings["embedding_dim"] == 16
    assert convert(str(tmp_path / "theirs"), tmp_path / "back") == "hf_rnn_tirex2"
    weights = load_file(tmp_path / "theirs/model.safetensors")
    others = {"fwd_cell": "rev_cell", "_recurrent_kernel_": "recurrent_kernel"}
    for theirs, other in others.items():
        weights = {name.replace(theirs, other): x for name, x in weights.items()}
    save_file(weights, tmp_path / "theirs/model.safetensors")
    for folder in ("theirs", "back"):
        again, info = hf_rnn.TiRex2ForPrediction.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()) and torch.equal(again.predict(x, 9).full_predictions, expected)


def test_one_file(tmp_path):
    """What trust_remote_code=True runs where the package is missing; nothing in it is."""
    write_bundle(hf_rnn.TiRex2Config, tmp_path)
    assert "def predict" in (tmp_path / "modeling_hf_rnn.py").read_text()
    command = ["ruff", "check", "--isolated", "--select", "F", "modeling_hf_rnn.py"]
    result = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(act_func="Swoosh"), "act_func: expected one of SiLU"),
        (dict(output_patch_size=8), "output_patch_size: expected input_patch_size, 4, got 8"),
        (dict(tokenizer_cfg=dict(input_patch_size=4, output_patch_size=4, input_patch_stride=2)), "input_patch_stride"),
        (dict(fancy=1), "fancy: not a setting"),
        (dict(quantiles=None), "quantiles"),
    ],
)
def test_configs_of_others(change, message, tmp_path):
    config = to_tirex_config(hf_rnn.TiRex2Config(**SIZES))
    assert hf_rnn.TiRex2Config(**from_tirex_config(config)).sizes == hf_rnn.TiRex2Config(**SIZES).sizes
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Exception, match=message):
        hf_rnn.TiRex2Config.from_pretrained(tmp_path)


def test_blocks_of_others():
    config = to_tirex_config(hf_rnn.TiRex2Config(**SIZES))
    config["stack_config"]["templates"]["slstm"]["variate_mixer"]["num_heads"] = 8
    with pytest.raises(ValueError, match="expected one num_attention_heads for all blocks"):
        from_tirex_config(config)
    del config["stack_config"]["recipe"]
    with pytest.raises(ValueError, match="'recipe'"):
        from_tirex_config(config)
    with pytest.raises(ValueError, match="norm_eps: tirex-2 has 1e-6 alone"):
        to_tirex_config(hf_rnn.TiRex2Config(**SIZES, norm_eps=1e-5))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(prediction_length=10), "prediction_length: expected a multiple of patch_size, 4, got 10"),
        (dict(quantiles=[0.5, 0.1]), "quantiles: expected numbers between 0 and 1 that rise"),
        (dict(quantiles=[]), "quantiles"),
        (dict(quantiles=[0.1, 0.5], sign_flip=True), "sign_flip: expected with each quantile q also 1 - q"),
        (dict(slstm_at=[3]), "slstm_at: expected indices from 0 to 2, got 3"),
        (dict(num_heads=3), "num_heads: expected heads among which hidden_size, 16, can be divided twice, got 3"),
        (dict(num_attention_heads=3), "num_attention_heads"),
        (dict(hidden_act="swoosh"), "hidden_act"),
        (dict(context_length=0), "context_length"),
        (dict(bidirectional=True), "bidirectional: a TiRex-2 has none to choose"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(Exception, match=message):
        hf_rnn.TiRex2Config(**SIZES | settings)


X = torch.zeros(2, 20)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(series=X, horizon=13),
            r"horizon: expected 1 to 12 steps.*\(config.prediction_length\), got 13; forecast a",
        ),
        (dict(series=X, horizon=0), "horizon: expected 1 to 12"),
        (dict(series=X, horizon=2.0), "horizon: expected a whole number"),
        (dict(series=X[:, :0], horizon=2), r"series\[0\]: expected \(T,\) or \(V, T\) with at least one step"),
        (dict(series=[], horizon=2), "series: expected at least one"),
        (
            dict(series=X[None, None], horizon=2),
            r"series: expected \(T,\), \(B, T\) or \(B, V, T\), got \(1, 1, 2, 20\)",
        ),
        (dict(series="sales", horizon=2), "series: expected a tensor, a numpy array or a list of these, got a str"),
        (dict(series=[[1.0]], horizon=2), r"series\[0\]: expected a tensor or a numpy array, got a list"),
        (dict(series=X + 1j, horizon=2), r"series\[0\]: expected real numbers"),
        (dict(series=[X[0], X[1] + torch.inf], horizon=2), r"series\[1\]: .* infinity in variate 0, step 0"),
        (dict(series=X, horizon=2, past_covariates=X[:, :19]), r"past_covariates\[0\]: expected the series' steps, 20"),
        (dict(series=X, horizon=2, past_covariates=X[:1]), "past_covariates: expected those of 2 series, got 1"),
        (dict(series=X, horizon=2, future_covariates=X), r"future_covariates\[0\]: expected .*, 22 in all, got 20"),
        (dict(series=X, horizon=2, quantiles=[0.05]), "quantiles: expected what this model predicts, 0.1 to 0.9"),
        (dict(series=X, horizon=2, quantiles=[0.5, 0.2]), "quantiles: expected numbers between 0 and 1 that rise"),
        (dict(series=X, horizon=2, batch_size=0), "batch_size"),
    ],
)
def test_wrong_series(model, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model.predict(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(past_values=X.long()), "past_values: expected a floating tensor, got torch.int64"),
        (dict(past_values=X[0]), r"past_values: expected shape \(R, T\)"),
        (dict(past_values=X + torch.inf), "past_values: expected finite values, .* infinity in row 0, step 0"),
        (dict(past_values=X, future_values=X[:1, :5]), r"future_values: expected floating \(R, horizon\) = \(2, 5\)"),
        (dict(past_values=X, future_covariates=X[:, :5], horizon=4), "future_covariates: expected"),
        (dict(past_values=X, group_ids=torch.zeros(3)), "group_ids: expected shape"),
        (dict(past_values=X, group_ids=torch.zeros(2)), "group_ids: expected whole numbers"),
        (dict(past_values=X, target_mask=torch.ones(2)), "target_mask: expected bool"),
        (dict(past_values=X, horizon=13), "horizon"),
        (dict(past_values=X, attention_mask=X), "attention_mask: no argument of forward"),
    ],
)
def test_wrong_rows(model, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model(**arguments)


def test_classes_of_series(model, tmp_path):
    """By the mean over patches and variates, from a forecaster's weights; each series by itself."""
    model.save_pretrained(tmp_path)
    options = dict(num_labels=3, dtype=torch.float64)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, **options).eval()
    assert type(classifier) is hf_rnn.TiRex2ForSequenceClassification
    values, groups = walk(5, 17), torch.tensor([7, 2, 7, 9, 2])
    values[3, :11] = NAN
    found = classifier(values, group_ids=groups).logits
    for number, rows in enumerate(([1, 4], [0, 2], [3])):
        window = F.pad(values[rows], (CONTEXT - 17, 0), value=NAN)
        x = classifier.model(window, torch.zeros(len(rows), dtype=torch.long)).last_hidden_state
        there = ~window.unflatten(1, (-1, P)).isnan().all(2)
        mean = torch.stack([y[t].mean(0) for y, t in zip(x, there, strict=True)]).mean(0)
        assert relative_error(found[number], classifier.score(mean)) <= 1e-10
    outputs = classifier(values, labels=torch.tensor([0, 2, 1, 0, 0]))
    assert relative_error(outputs.loss, F.cross_entropy(outputs.logits, torch.tensor([0, 2, 1, 0, 0]))) <= 1e-10
    outputs.loss.backward()
    assert all(p.grad is not None for p in classifier.score.parameters())
    with pytest.raises(ValueError, match=r"labels: expected shape \(3,\)"):
        classifier(values, group_ids=groups, labels=torch.tensor([0, 2, 1, 0, 0]))
