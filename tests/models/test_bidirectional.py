"""Models that read both ways: each sequence's real tokens, whatever lies beside them."""

import copy

import pytest
import torch
from conftest import LAYOUTS, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import hf_rnn
from hf_rnn.layers import Bidirectional
from hf_rnn_kernels import SequenceLayout

TOLERANCE = 1e-5


def make(name: str, **config):
    """A small backbone with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    stem = next(s for s in hf_rnn.ARCHITECTURES if s.lower() == name.split("-")[0])
    told = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, initializer_range=0.3, bidirectional=True)
    tokens = dict(pad_token_id=58, bos_token_id=59, eos_token_id=60)
    model = getattr(hf_rnn, f"{stem}Model")(LAYOUTS[name][0](**told | tokens | config))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "initial_state" in key or "bias" in key:
                parameter.normal_()
    return model.eval()


NAMES = sorted(name for name in LAYOUTS if "attention" not in name)


@pytest.fixture(params=NAMES)
def model(request):
    return make(request.param)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_each_way(name, shared):
    """A bidirectional layer is the sum of a layer over the tokens and one over the tokens the other way round."""
    model = make(name, share_directions=shared)
    layers = [layer for layer in model.modules() if isinstance(layer, Bidirectional)]
    assert len(layers) >= 2 and all((layer.backwards is None) == shared for layer in layers)
    for layer in layers:
        x, leaves = torch.randn(3, 9, 16, requires_grad=True), list(layer.parameters())
        y, states = layer(x, None, SequenceLayout())
        backwards = layer.backwards or layer.forwards
        expected = layer.forwards(x, None, SequenceLayout())[0]
        expected = expected + backwards(x.flip(1), None, SequenceLayout())[0].flip(1)
        assert states == () and relative_error(y, expected) <= 1e-6
        grad = torch.randn_like(y)
        ours = torch.autograd.grad(y, [x, *leaves], grad, allow_unused=True)
        theirs = torch.autograd.grad(expected, [x, *leaves], grad, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or relative_error(a, b) <= TOLERANCE


@pytest.mark.parametrize("name", ["mingru", "gru-paper", "lstm"])
def test_shared_weights_project_once(name):
    """Gate and output projection are linear in h: they take both directions' sum."""
    mixer, calls = make(name, share_directions=True).layers[0].mixer, []
    for part in ("gate_proj", "out_proj"):
        if (linear := getattr(mixer.forwards, part)) is not None:
            linear.register_forward_hook(lambda *_, part=part: calls.append(part))
    mixer(torch.randn(3, 9, 16), None, SequenceLayout())
    assert "out_proj" in calls and len(calls) == len(set(calls))


def test_both_ends_are_seen(model, ids):
    y = model(ids).last_hidden_state
    for at in (0, ids.shape[1] - 1):
        other = ids.clone()
        other[:, at] = (other[:, at] + 1) % 58
        assert ((model(other).last_hidden_state - y).abs().amax((0, 2)) > 0).all()


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 7), st.integers(0, 3)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_padding_packing_and_order_change_nothing(name, rows, random):
    """Rows of tokens between padding, in any order, and packed after one another: what each gives alone."""
    model = MODELS.setdefault(name, make(name))
    texts = [torch.tensor([random.randrange(58) for _ in range(length)]) for _, length, _ in rows]
    alone = [model(text[None]).last_hidden_state[0] for text in texts]
    width = max(sum(row) for row in rows)
    ids, mask = torch.full((len(rows), width), 58), torch.zeros(len(rows), width, dtype=torch.long)
    for n, ((left, length, _), text) in enumerate(zip(rows, texts, strict=True)):
        ids[n, left : left + length], mask[n, left : left + length] = text, 1
    order = random.sample(range(len(rows)), len(rows))
    padded = model(ids[order], attention_mask=mask[order]).last_hidden_state
    for n, row in zip(order, padded, strict=True):
        torch.testing.assert_close(row[mask[n].bool()], alone[n], rtol=1e-4, atol=1e-5)
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    packed = model(torch.cat(texts)[None], position_ids=positions).last_hidden_state[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


MODELS: dict = {}


def test_gradients_of_padded_and_packed_rows(model):
    texts = [torch.arange(5), torch.arange(3) + 20]
    ids = torch.full((2, 7), 58)
    ids[0, :5], ids[1, 4:] = texts[0], texts[1]
    grads = []
    for call in (
        lambda: model(ids, attention_mask=ids != 58).last_hidden_state[ids != 58],
        lambda: model(torch.cat(texts)[None], cu_seq_lens_q=torch.tensor([0, 5, 8])).last_hidden_state[0],
        lambda: torch.cat([model(text[None]).last_hidden_state[0] for text in texts]),
    ):
        model.zero_grad()
        (call() * torch.linspace(-1, 1, 16)).sum().backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for padded, packed, alone in zip(*grads, strict=True):
        if alone is not None and alone.norm() > 1e-6:
            assert max(relative_error(padded, alone), relative_error(packed, alone)) <= 1e-4


def test_saved_copied_and_half(model, ids, tmp_path):
    y = model(ids).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).last_hidden_state, y) and loaded.config.bidirectional
    assert torch.equal(copy.deepcopy(model)(ids).last_hidden_state, y)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert relative_error(half(ids).last_hidden_state, y) <= 0.2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("gru", "mingru"))) for n in NAMES]
)
def test_compiles_and_checkpoints(name, ids):
    torch._dynamo.reset()  # other models compiled in this process count against its limit
    model = make(name)
    ids = ids[:, :4]  # the memory RNN's loop over time is unrolled
    expected = model(ids).last_hidden_state
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(ids).last_hidden_state, expected) <= TOLERANCE
    model.train().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    y = model(ids).last_hidden_state
    y.sum().backward()
    assert relative_error(y, expected) <= TOLERANCE


@pytest.mark.parametrize("stem", hf_rnn.ARCHITECTURES)
def test_no_language_model(stem):
    config = getattr(hf_rnn, f"{stem}Config")(hidden_size=16, num_hidden_layers=1, bidirectional=True)
    with pytest.raises(ValueError, match="bidirectional: .*ForCausalLM predicts the next token"):
        getattr(hf_rnn, f"{stem}ForCausalLM")(config)
    with pytest.raises(ValueError, match="bidirectional: .*ForCausalLM"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(share_directions=True), "share_directions: expected False"),
        (dict(bidirectional=True, layer_types=["sliding_attention"] * 3), "bidirectional: attention"),
        (dict(bidirectional=True, output_projection=False, block_layout="paper", expansion_factor=1), "output_proj"),
        (dict(embedding_size=7), "embedding_size: expected hidden_size"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(Exception, match=message):
        hf_rnn.MinGRUConfig(**settings)


def test_convolutions_add_up_where_recurrences_stand_side_by_side(ids):
    model = make("gru-paper", output_projection=False)
    block = model.layers[0]
    assert block.mixer.side_by_side and not block.conv.side_by_side
    x = torch.randn(2, 7, 16)
    expected = x + block.conv.forwards(x, None, SequenceLayout())[0]
    expected = expected + block.conv.backwards(x.flip(1), None, SequenceLayout())[0].flip(1)
    u = block.mixer_norm(expected)
    halves = (
        block.mixer.forwards(u, None, SequenceLayout())[0],
        block.mixer.backwards(u.flip(1), None, SequenceLayout())[0],
    )
    expected = expected + torch.cat([halves[0], halves[1].flip(1)], -1)
    expected = expected + block.ff(block.ff_norm(expected))
    assert relative_error(block(x), expected) <= TOLERANCE
    assert model(ids).last_hidden_state.shape == (3, 17, 16)


@pytest.mark.parametrize("batch, time", [(3, 9), (1, 9), (3, 1)])
def test_side_by_side_in_the_memory_that_both_have(batch, time):
    """torch's LSTM reads and gives tokens time by time; putting them row by row between layers is a copy for each."""
    model = hf_rnn.LSTMModel.from_torch(torch.nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True))
    y = model(inputs_embeds=torch.randn(batch, time, 6)).last_hidden_state
    assert y.shape == (batch, time, 10) and y.transpose(0, 1).is_contiguous()
    gru = hf_rnn.GRUModel.from_torch(torch.nn.GRU(6, 5, batch_first=True, bidirectional=True))
    assert gru(inputs_embeds=torch.randn(batch, time, 6)).last_hidden_state.is_contiguous()


def test_no_state(ids):
    model = make("mingru")
    assert model(ids).past_key_values is None and not model.config.use_cache
    with pytest.raises(ValueError, match="cache, use_cache: a bidirectional model"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="cache, use_cache: a bidirectional model"):
        model(ids, cache=hf_rnn.RecurrentCache(2))
