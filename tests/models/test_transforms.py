"""Models under torch.func's transforms and FakeTensorMode, as transformers' own."""

import pytest
import torch
from conftest import LAYOUTS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

from hf_rnn_kernels import gru_scan, min_gru_scan

# What the architecture has beside its default: heads; both kinds of blocks
MORE = {"gru": dict(num_heads=2), "xlstm": dict(block_layout="neurips", slstm_at=[1], num_heads=2)}
LOOP = "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning"


@pytest.fixture
def loss(architecture, make_model):
    """A model's parameters, and its loss as a function of them."""
    model = make_model(**MORE.get(architecture, {}))

    def loss(parameters, ids, mask=None):
        inputs = dict(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        return functional_call(model, parameters, (), inputs).loss

    return dict(model.named_parameters()), loss


def gradients(loss, parameters, *arguments):
    values = list(parameters.values())
    grads = torch.autograd.grad(loss(parameters, *arguments), values, materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def test_grad(loss, ids):
    parameters, loss = loss
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    torch.testing.assert_close(grad(loss)(parameters, ids, mask), gradients(loss, parameters, ids, mask))


@pytest.mark.filterwarnings(LOOP)
def test_gradients_of_each_sample(loss, ids):
    parameters, loss = loss
    each = vmap(grad(loss), (None, 0))(parameters, ids[:, None])
    for n in range(len(ids)):
        expected = gradients(loss, parameters, ids[n : n + 1])
        torch.testing.assert_close({name: g[n] for name, g in each.items()}, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings(LOOP)
def test_several_models_at_once(loss, ids):
    """And their gradient, through vmap."""
    parameters, loss = loss
    stacked = {name: torch.stack([p, 0.9 * p]).detach().requires_grad_() for name, p in parameters.items()}
    losses = vmap(loss, (0, None))(stacked, ids)
    grads = torch.autograd.grad(losses.sum(), list(stacked.values()), materialize_grads=True)
    for n in range(2):
        own = {name: p[n] for name, p in stacked.items()}
        torch.testing.assert_close(losses[n], loss(own, ids))
        expected = gradients(loss, own, ids)
        torch.testing.assert_close(dict(zip(own, (g[n] for g in grads), strict=True)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings(LOOP)
def test_rows_without_gradients(model, ids):
    """Through the operators alone, and a token through the cells."""
    with torch.no_grad():
        for x in (ids, ids[:, :1]):
            rows = vmap(lambda row: model(row, use_cache=False).logits)(x[:, None])
            torch.testing.assert_close(rows[:, 0], model(x).logits, atol=1e-5, rtol=1e-4)


def test_fake_tensors(architecture, ids):
    """A training step, a prompt with padding and a token after it, without memory."""
    config_class, model_class, classifier_class = LAYOUTS[architecture]
    config = config_class(vocab_size=61, hidden_size=16, num_labels=3, **MORE.get(architecture, {}))
    with FakeTensorMode():
        model = model_class(config)
        ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
        model.train()(ids, labels=ids).loss.backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
        prompt = model.eval()(ids, attention_mask=mask)
        step = model(ids[:, :1], attention_mask=mask.new_ones(2, 10), past_key_values=prompt.past_key_values)
        assert prompt.logits.shape == (2, 9, 61) and step.logits.shape == (2, 1, 61)
        assert classifier_class(config)(ids, attention_mask=mask).logits.shape == (2, 3)


def test_real_ids_in_fake_mode(model, ids):
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(ids, labels=ids).logits.shape == (*ids.shape, 61)


def test_elements_of_vmap_are_scans_of_their_own():
    """Along any dimension, with weights that they share; and no second derivatives, rather than wrong ones."""
    gate, candidate = torch.randn(2, 3, 5, 6, 4).unbind(0)
    h, last = vmap(min_gru_scan, (1, 1))(gate, candidate)
    for n in range(5):
        torch.testing.assert_close((h[n], last[n]), min_gru_scan(gate[:, n], candidate[:, n]))
    x, weight = torch.randn(4, 2, 5, 9), torch.randn(1, 9, 3)
    torch.testing.assert_close(
        vmap(gru_scan, (0, None))(x, weight)[0], gru_scan(x.flatten(0, 1), weight)[0].view(4, 2, 5, 3)
    )
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad(lambda g: grad(lambda c: min_gru_scan(gate[:, 0], c)[0].sum())(g).sum())(candidate[:, 0])


def test_meta_device(architecture):
    """A prompt and a token after it, counted without memory."""
    config_class, model_class, _ = LAYOUTS[architecture]
    with torch.device("meta"):
        model = model_class(config_class(vocab_size=61, hidden_size=16)).eval()
        prompt = model(torch.zeros(2, 9, dtype=torch.long), use_cache=True)
        step = model(torch.zeros(2, 1, dtype=torch.long), cache=prompt.cache)
    assert prompt.logits.shape == (2, 9, 61) and step.logits.shape == (2, 1, 61)
