"""The `tirex-2` package's model of random weights, read from the files that it is shared as: the same forecasts.

`make test-forecasting-peers` installs it; the other tests do without.
"""

import json

import pytest
import torch
from conftest import relative_error
from safetensors.torch import save_file
from tirex2._state_dict import shared_tensor_groups
from tirex2.model import TiRex2
from tirex2.model.types import TimeseriesType

import hf_rnn

torch.compiler.set_stance("force_eager")

NAN = float("nan")
SMALL = dict(width=32, blocks=3, heads=2, patch=8, context=64, longest=24, hidden=48)
PUBLISHED = dict(width=512, blocks=12, heads=4, patch=32, context=2048, longest=320, hidden=2048)


def settings(width, blocks, heads, patch, context, longest, hidden, **others):
    """A config.json."""

    def template(kind):
        time = dict(model_type=kind, embedding_dim=width, num_heads=heads)
        return dict(time_mixer=time, variate_mixer=dict(embedding_dim=width, num_heads=heads), dropout=0.0, eps=1e-6)

    sizes = dict(input_patch_size=patch, output_patch_size=patch)
    config = dict(
        stack_config=dict(
            templates=dict(m=template("bi-mlstm"), s=template("bi-slstm")),
            recipe=["ms"[number % 2] for number in range(blocks)],
        ),
        num_blocks=blocks,
        embedding_dim=width,
        **sizes,
        quantiles=[number / 10 for number in range(1, 10)],
        tokenizer_cfg=sizes | dict(input_patch_stride=patch),
        scaler_cfg=dict(use_arcsinh=True, binaryaware=True),
        h_expand=4,
        context_len=context,
        future_len=longest,
        input_ff_dim=hidden,
        act_func="SiLU",
        dropout=0.0,
        stack_out_norm_config=dict(eps=1e-6),
    )
    return config | others


def make(folder, sizes):
    """The package's model, and ours from its files."""
    torch.manual_seed(0)
    config = settings(**sizes)
    peer = TiRex2(**config | {"device": "cpu"}).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():  # what starts as 0 or 1
            if "norm" in name or "gate_preact" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "_recurrent_kernel_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    (folder / "config.json").write_text(json.dumps(config))
    save(peer, dict(peer.named_parameters(remove_duplicate=False)), folder)
    ours, info = hf_rnn.TiRex2ForPrediction.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and sum(p.numel() for p in ours.parameters()) == sum(
        p.numel() for p in peer.parameters()
    )
    return peer, ours.eval()


def save(peer, tensors, folder):
    """As the package saves: tensors that have several names once."""
    others = {name for names in shared_tensor_groups(peer) for name in names[1:]}
    kept = {name: x.detach().contiguous() for name, x in tensors.items() if name not in others}
    save_file(kept, folder / "model.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make(tmp_path_factory.mktemp("published"), PUBLISHED)


def walk(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cumsum(-1)


def rows(time, longest):
    """Three series as rows (R, T), covariates known beforehand (R, longest), the series they are of, and targets."""
    x, future = walk(7, time), torch.full((7, longest), NAN)
    x[0, : time // 5], x[1, time // 2 : time // 2 + 5], x[3] = NAN, NAN, (x[3] > 0).float()
    future[2], future[4], future[4, 3] = walk(longest, seed=1), walk(longest, seed=2), NAN
    series = torch.tensor([5, 5, 5, 2, 2, 9, 5])
    return x, future, series, torch.tensor([True, True, False, True, False, True, False])


def raw(peer, x, future, series, targets):
    """Its forward's forecast (R, horizon, Q)."""
    window = peer._fix_context_size(future.shape[1], torch.cat([x, future], 1), True)
    y = peer(dict(x=window, group_vector=series.float(), target_mask=targets))
    return y[..., -peer.future_len - peer.output_patch_size :][..., : future.shape[1]].transpose(1, 2)


@pytest.mark.parametrize("size", ["pair", "published"])
def test_forward_and_gradients(size, request, tmp_path):
    peer, ours = request.getfixturevalue(size)
    x, future, series, targets = rows(peer.context_len - 7, peer.future_len)
    expected = raw(peer, x, future, series, targets)
    found = ours(x, future_covariates=future, group_ids=series, target_mask=targets).full_predictions
    assert relative_error(found[targets], expected[targets]) <= 1e-5
    gradient = torch.randn_like(found) * targets[:, None, None]
    expected.backward(gradient)
    found.backward(gradient)
    (tmp_path / "config.json").write_text(json.dumps(settings(**SMALL if size == "pair" else PUBLISHED)))
    save(peer, {name: p.grad for name, p in peer.named_parameters(remove_duplicate=False)}, tmp_path)
    wanted = dict(hf_rnn.TiRex2ForPrediction.from_pretrained(tmp_path).named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, wanted[name]) <= (1e-4 if size == "pair" else 1e-3), name
    peer.zero_grad(), ours.zero_grad()


@pytest.mark.parametrize(
    "others",
    [
        dict(stack_out_norm_config=None),
        dict(stack_out_norm_config=dict(use_rmsnorm=True)),
        dict(use_qk_norm=False, act_func="torch.nn.GELU"),
        dict(scaler_cfg=dict(use_arcsinh=False, binaryaware=False, eps=1e-3)),
        dict(h_expand=2.5, quantiles=[0.05, 0.5, 0.95], tta_sign_flip=True, tta_diff=False, device="cuda"),
    ],
)
@torch.no_grad()
def test_other_settings(others, tmp_path):
    peer, ours = make(tmp_path, SMALL | others)
    x, future, series, targets = rows(50, 24)
    expected = raw(peer, x, future, series, targets)
    found = ours(x, future_covariates=future, group_ids=series, target_mask=targets).full_predictions
    assert relative_error(found[targets], expected[targets]) <= 1e-5
    (wanted,), found = peer.predict([TimeseriesType(x[2:3], None, None)], 24), ours.predict(x[2:3], 24)
    assert relative_error(found.full_predictions, wanted.transpose(1, 2)) <= 1e-5


def series(time, horizon, targets=1, past=0, future=0, trend=0.0, seed=0):
    target = walk(targets, time, seed=seed)
    target[0] += trend * torch.arange(time)
    if time > 10:
        target[0, 4:7] = target[-1, 0] = NAN
    covariates = [walk(count, steps, seed=seed + 1) if count else None for count, steps in
                  ((past, time), (future, time + horizon))]  # fmt: skip
    return target, *covariates


def cases(horizon):
    binary = (walk(1, 45, seed=7) > 0).float()
    return [
        series(50, horizon),
        series(90, horizon, trend=1.0),
        series(70, horizon, targets=3, past=1, trend=2.0),
        series(30, horizon, targets=2, future=2),
        series(100, horizon, past=2, future=1, trend=-2.0),
        series(3, horizon, targets=2),
        (binary, None, None),
        (torch.full((1, 40), NAN), None, None),
        (torch.full((2, 40), 3.7), None, None),
    ]


@pytest.mark.parametrize("horizon", [24, 11, 1])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("differencing", [False, True])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("longest", [100, 55])
def test_predict(pair, horizon, flip, differencing, pad, longest):
    """Any mixture of series in a batch; contexts longer than the model's and shorter."""
    peer, ours = pair
    found = [case for case in cases(horizon) if case[0].shape[1] <= longest]
    expected = peer.predict(
        [TimeseriesType(*case) for case in found], horizon, tta_sign_flip=flip, tta_diff=differencing, pad_context=pad
    )
    targets, past, future = zip(*found, strict=True)
    predictions = ours.predict(
        list(targets), horizon, list(past), list(future), sign_flip=flip, differencing=differencing, pad_context=pad
    ).full_predictions
    for y, wanted in zip(predictions, expected, strict=True):
        assert relative_error(y, wanted.transpose(1, 2)) <= 1e-5


@pytest.mark.parametrize("flip, differencing", [(False, False), (True, True)])
def test_predict_at_published_size(published, flip, differencing):
    peer, ours = published
    found = [
        series(2048, 64),
        series(300, 64, targets=2, past=1, future=1, trend=1.0),
        series(3000, 64, future=2, trend=-0.5, seed=3),
    ]
    options = dict(tta_sign_flip=flip, tta_diff=differencing)
    expected = peer.predict([TimeseriesType(*case) for case in found], 64, **options)
    targets, past, future = map(list, zip(*found, strict=True))
    predictions = ours.predict(targets, 64, past, future, sign_flip=flip, differencing=differencing).full_predictions
    for y, wanted in zip(predictions, expected, strict=True):
        assert relative_error(y, wanted.transpose(1, 2)) <= 1e-4
