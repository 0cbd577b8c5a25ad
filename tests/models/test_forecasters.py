"""Forecasts by any architecture, of whole series and of series that go on, scores and embeddings."""

import copy

import numpy as np
import pytest
import torch
import transformers
from conftest import relative_error
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F

import hf_rnn
from hf_rnn.forecasting.scaling import standardize

NAN = float("nan")
P, CONTEXT, LONGEST = 4, 24, 12
STEMS = [*hf_rnn.ARCHITECTURES, *hf_rnn.FORECASTERS]
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_input_features=1, patch_size=P, context_length=CONTEXT)
SIZES |= dict(prediction_length=LONGEST, patch_intermediate_size=20, head_intermediate_size=24)
OWN = {"TiRex2": dict(num_heads=2, num_attention_heads=2), "XLSTM": dict(num_heads=2)}


def make(stem, **settings):
    """A small model in float64 whose every weight matters."""
    torch.manual_seed(0)
    config = getattr(hf_rnn, f"{stem}Config")(**SIZES | OWN.get(stem, {}) | settings)
    model = getattr(hf_rnn, f"{stem}ForPrediction")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=STEMS)
def model(request):
    return make(request.param)


def walk(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).cumsum(-1)


def exact(model):
    """By which TiRex-2 forecasts as it does of states."""
    return dict(differencing=False, pad_context=False) if model.reads_variates else {}


@torch.no_grad()
def test_the_equations():
    """The last patches' outputs of a backbone that reads values and marks of missing ones, those to come all missing,
    are the quantiles."""
    model = make("MinGRU")
    past = torch.tensor(walk(2, 19))
    past[1, :9], past[0, 12:14] = NAN, NAN
    found = model(past, horizon=7).full_predictions
    for row, first in ((0, 0), (1, 8)):  # what is missing in front is not there
        x = F.pad(past[row], (1, 4), value=NAN)[first:]
        loc, scale = x.nanmean(), (x - x.nanmean()).square().nanmean().sqrt()
        z = ((x - loc) / scale).arcsinh().unflatten(0, (-1, P))
        tokens = torch.stack([z.nan_to_num(0.0), z.isnan().double()], -1).flatten(1)
        mlp = model.model.embed_features.proj
        tokens = mlp.output_proj(F.silu(mlp.hidden_proj(tokens))) + mlp.skip_proj(tokens)
        last = model.model(inputs_embeds=tokens[None]).last_hidden_state[0, -2:]
        head = model.quantile_head
        z = (head.output_proj(F.silu(head.hidden_proj(last))) + head.skip_proj(last)).unflatten(1, (9, P))
        quantiles = (z.transpose(1, 2).flatten(0, 1).sinh() * scale + loc)[:7]
        assert relative_error(found[row], quantiles) <= 1e-12


def test_series_are_forecast_by_themselves(model):
    """Among others of other lengths, several variates and missing values."""
    series = [walk(21), walk(2, 13, seed=2), walk(30, seed=3), np.full(5, NAN)]
    series[2][:8] = NAN
    options = dict(differencing=False)
    together = model.predict(series, 9, **options).full_predictions
    for one, expected in zip(series, together, strict=True):
        alone = model.predict(one, 9, **options) if one.ndim == 1 else model.predict(one[None], 9, **options)
        found = alone.full_predictions if one.ndim == 1 else alone.full_predictions[0]
        assert relative_error(torch.tensor(found), torch.tensor(expected)) <= 1e-10
    assert together[1].shape == (2, 9, 9)


def test_gradients_reach_every_weight(model):
    values = torch.tensor(walk(2, 21))
    options = dict(group_ids=torch.tensor([0, 0])) if model.reads_variates else {}
    model.zero_grad()
    model(values, future_values=torch.tensor(walk(2, LONGEST, seed=2)), **options).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("directions_proj" in name for name in without)  # of covariates alone
    model.zero_grad()


@pytest.mark.parametrize("shape", [(23,), (2, 24), (2, 3, 22)])
def test_a_state_forecasts_as_the_series(model, shape):
    """However the values came, in the scale of all of them; patches are whole where the series' are."""
    values = walk(*shape)
    values[..., 5:7] = NAN
    first = shape[-1] - 3 * P
    rows = torch.tensor(values).reshape(-1, shape[-1])
    scaling = standardize(rows)
    expected = model.predict(values, LONGEST, quantiles=[0.1, 0.45], **exact(model))
    for cuts in ([], [first], [first, first + 1, first + 6], range(first, shape[-1])):
        state = None
        for piece in np.split(values, cuts, -1):
            state = model.observe(piece, state, scaling if state is None else None)
        assert state.seen_steps == shape[-1] and state.pending.shape[1] == 0
        found = model.predict(state, LONGEST, quantiles=[0.1, 0.45])
        for name in ("mean_predictions", "full_predictions"):
            assert isinstance(found[name], np.ndarray) and found[name].shape == expected[name].shape
            assert relative_error(torch.tensor(found[name]), torch.tensor(expected[name])) <= 1e-10


@pytest.mark.parametrize("pieces", [(P, 2 * P), (3, 1, 2, 5)])
def test_looking_ahead_changes_nothing(model, pieces):
    """A forecast from the pass in which values were read, also a shorter or a longer one."""
    values = walk(2, 9 + sum(pieces), seed=4)
    ahead, plain = None, None
    for piece in np.split(values, np.cumsum((9, *pieces))[:-1], -1):
        ahead, plain = model.observe(piece, ahead, horizon=6), model.observe(piece, plain)
        assert ahead.outputs.shape[1] == 2 + (ahead.pending.shape[1] > 2) and plain.outputs.shape[1] == 1
        for horizon in (1, 6, LONGEST):
            found, expected = (model.predict(state, horizon).full_predictions for state in (ahead, plain))
            assert relative_error(torch.tensor(found), torch.tensor(expected)) <= 1e-12
    with pytest.raises(ValueError, match="horizon: expected 1 to 12"):
        model.observe(values, horizon=13)


def test_values_within_a_patch_are_read_with_the_next(model):
    """As a patch whose other values are missing; forecasting leaves the state as it is."""
    values = torch.tensor(walk(2, 2 * P + 3))
    state = model.observe(values[:, : 2 * P])
    before = model.predict(copy.deepcopy(state), P).full_predictions
    state = model.observe(values[:, 2 * P :], state)
    found = model.predict(state, 2 * P).full_predictions
    assert torch.equal(found, model.predict(state, 2 * P).full_predictions)
    if not model.reads_variates:  # whose bands widen over the horizon
        assert relative_error(found[:, :1], before[:, 3:]) <= 1e-12  # of what the last whole patch says
    filled = F.pad(values, (0, 1), value=NAN)
    whole = model.observe(filled, scaling=state.scaling)
    after = model.predict(whole, P).full_predictions
    if not model.reads_variates:
        assert relative_error(found[:, 1 : 1 + P], after) <= 1e-10


def test_scores_say_how_far_outside(model):
    values = walk(2, 5 * P + 2)
    values[0, 9] = NAN
    scores, state = model.score(values)
    pieces, other = [], None
    for piece in np.split(values, [P + 2, P + 3, 3 * P + 3], -1):
        if other is None:
            other = model.observe(piece, scaling=state.scaling)
            pieces.append(np.full_like(piece, NAN))
        else:
            found, other = model.score(piece, other)
            pieces.append(found)
    pieces = np.concatenate(pieces, 1)
    assert np.isnan(scores[:, :2]).all() and np.isnan(scores[0, 9]) and np.isnan(scores).sum() == 5
    np.testing.assert_allclose(pieces[:, P + 2 :], scores[:, P + 2 :], atol=1e-10)
    if not model.reads_variates:
        bands = np.sort(model.predict(state, 1).full_predictions[:, 0])[:, [0, -1]]
        beyond = bands[:, 1:] + 2 * (bands[:, 1:] - bands[:, :1])
        np.testing.assert_allclose(model.score(beyond, copy.deepcopy(state))[0], 2.0, rtol=1e-8)
        assert (model.score(bands.mean(1, keepdims=True), state)[0] == 0).all()


def test_embeddings_are_of_what_is_there(model):
    """Not of padding, other series, level and deviation."""
    series = [walk(21), walk(2, 13, seed=2), 100 + 7 * walk(21)]
    found = model.embed(series)
    assert found.shape == (3, 3 * 16) and found.dtype == np.float32
    np.testing.assert_allclose(found[0], found[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0], model.embed(walk(21)[None])[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], model.embed(walk(2, 13, seed=2)[None])[0], rtol=1e-4, atol=1e-5)
    assert model.embed(series, batch_size=1).shape == (3, 48)


def test_saving_and_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path)
    values = walk(2, 21)
    assert type(again) is type(model)
    found, expected = (torch.tensor(m.predict(values, 5).full_predictions) for m in (again, model))
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("stem", ["MinGRU", "TiRex2"])
def test_what_is_refused(stem):
    model = make(stem)
    state = model.observe(walk(2, 9))
    with pytest.raises(ValueError, match=r"values: expected those of the state's series, \(2, 'T'\), got \(3, 4\)"):
        model.observe(walk(3, 4), state)
    with pytest.raises(ValueError, match="scaling: a state has its own"):
        model.observe(walk(2, 4), state, state.scaling)
    with pytest.raises(ValueError, match="scaling: expected that of 3 rows"):
        model.observe(walk(3, 4), scaling=state.scaling)
    with pytest.raises(TypeError, match="values: expected a tensor or a numpy array, got a list"):
        model.observe([1.0, 2.0])
    with pytest.raises(ValueError, match="infinity in variate 0, step 1"):
        model.observe(np.array([1.0, np.inf]))
    with pytest.raises(ValueError, match="horizon: expected 1 to 12 steps"):
        model.predict(state, 13)
    with pytest.raises(ValueError, match="sign_flip: a state is forecast without"):
        model.predict(state, 3, sign_flip=True)
    if stem == "TiRex2":
        return
    with pytest.raises(ValueError, match="covariates: this model reads each series by itself"):
        model.predict(walk(2, 9), 3, past_covariates=walk(2, 9))
    with pytest.raises(TypeError, match="group_ids: no argument"):
        model(torch.tensor(walk(2, 9)), group_ids=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="num_input_features: expected 1"):
        make(stem, num_input_features=2)
    with pytest.raises(ValueError, match="bidirectional: a forecast has nothing behind it"):
        make(stem, bidirectional=True)
    for setting, value in (("prediction_length", 0), ("quantiles", [0.5, 0.2]), ("patch_intermediate_size", 0)):
        with pytest.raises(StrictDataclassClassValidationError, match=f"{setting}: expected"):
            make(stem, **{setting: value})
    with pytest.raises(
        StrictDataclassClassValidationError, match="sign_flip: expected with each quantile q also 1 - q"
    ):
        make(stem, quantiles=[0.2, 0.5], sign_flip=True)
