"""The gated layout by its equation, attention by transformers' own, and checkpoints of before there were two layouts.
What every layout shares with the others: test_state.py, and all tests of the fixture `model`."""

import json

import pytest
import torch
from conftest import ARCHITECTURES
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

import hf_rnn
from hf_rnn.layers import SlidingAttention
from hf_rnn.models.xlstm.transformers_config import to_transformers_config
from hf_rnn_kernels import SequenceLayout

TOKENS = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
SIZES = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, initializer_range=0.3, **TOKENS)


def test_the_gated_block_is_its_equation():
    """x + W_out(h * SiLU(W_gate u)), h_t = h_{t-1} + sigmoid(W_z c) (W_h c - h_{t-1}), c the convolution of u."""
    torch.manual_seed(0)
    model = hf_rnn.MinGRUModel(hf_rnn.MinGRUConfig(**SIZES)).double()
    block, x = model.layers[0], torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        block.mixer.initial_state.normal_()
    m, u = block.mixer, F.rms_norm(x, (16,), block.mixer_norm.weight, model.config.norm_eps)
    c = F.conv1d(F.pad(u.mT, (3, 0)), m.conv.weight[:, None], m.conv.bias, groups=16).mT
    z, candidate = m.in_proj(c).chunk(2, -1)
    h, states = m.initial_state[0], []
    for t in range(9):
        h = h + torch.sigmoid(z[:, t]) * (candidate[:, t] - h)
        states.append(h)
    expected = x + m.out_proj(torch.stack(states, 1) * F.silu(m.gate_proj(u)))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("heads, groups, window", [(4, 4, 5), (4, 2, 7), (2, 1, 40), (1, 1, 1)])
def test_attention_is_that_of_transformers(heads, groups, window):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_attention_heads=heads, num_key_value_heads=groups, sliding_window=window)
    ours = SlidingAttention(hf_rnn.GRUConfig(layer_types=["sliding_attention"] * 3, use_bias=False, **sizes))
    config = MistralConfig(head_dim=16 // heads, attn_implementation="eager", **sizes)
    theirs = MistralAttention(config, 0)
    theirs.load_state_dict(ours.state_dict())
    x, time = torch.randn(2, 23, 16), torch.arange(23)
    distance = time[:, None] - time
    mask = torch.zeros(1, 1, 23, 23).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    expected, _ = theirs(x, MistralRotaryEmbedding(config)(x, time[None]), mask)
    y, (keys, values, filled) = ours(x, None, SequenceLayout())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert keys.shape == values.shape == (2, window, groups, 16 // heads)
    assert torch.equal(filled, (torch.arange(window) >= window - 23).float().expand(2, -1))


@torch.no_grad()
def test_the_state_of_attention_stays_small_and_exact():
    """After hundreds of single tokens, a stack of attention alone knows the last ones, exactly, and nothing else."""
    torch.manual_seed(0)
    settings = SIZES | dict(num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=6)
    model = hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(**settings)).eval()
    ids, state = torch.randint(0, 61, (2, 700)), hf_rnn.RecurrentCache(1)
    for token in ids.split(1, 1):
        logits = model(token, cache=state).logits
    torch.testing.assert_close(logits, model(ids[:, -6:]).logits[:, -1:], rtol=1e-5, atol=1e-5)
    assert sum(x.numel() for x in state[0]) == 2 * 6 * (2 * 16 + 1)
    torch.testing.assert_close(model(ids).logits[:, -1:], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_checkpoints_of_before_there_were_layouts(name, tmp_path, ids):
    """A config.json that says nothing of layouts and attention is one of the paper's blocks."""
    config_class, model_class, _ = ARCHITECTURES[name]
    new = {"block_layout", "layer_types", "sliding_window", "num_attention_heads", "num_key_value_heads", "rope_theta"}
    paper = dict(block_layout="paper") if name in ("gru", "lstm", "mingru", "minlstm") else {}
    model = model_class(config_class(**SIZES, **paper)).eval()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    kept = new if paper else new - {"block_layout"}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in saved.items() if k not in kept}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert not paper or again["block_layout"] == "paper"


def test_defaults_follow_from_the_layout():
    gated, paper, bare = (
        hf_rnn.MinLSTMConfig(**settings)
        for settings in ({}, dict(block_layout="paper"), dict(residual=False, conv_kernel=0, feed_forward_factor=0))
    )
    settings = ("block_layout", "expansion_factor", "feed_forward_factor", "use_g")
    assert [getattr(gated, name) for name in settings] == ["gated", 2, 0, False]
    assert [getattr(paper, name) for name in settings] == ["paper", 1, 4, True]
    assert [getattr(bare, name) for name in settings] == ["paper", 1, 0, True]


def test_what_loading_sets_is_checked_as_what_a_config_is_told(tmp_path):
    """Fewer and more layers of a recurrent stack, and what an attention cannot be."""
    hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(**SIZES)).save_pretrained(tmp_path / "recurrent")
    load = AutoModelForCausalLM.from_pretrained
    load(tmp_path / "recurrent", num_hidden_layers=1).save_pretrained(tmp_path / "one")
    assert len(load(tmp_path / "one").model.layers) == 1
    config = hf_rnn.GRUConfig(**SIZES)
    config.num_hidden_layers = 4
    assert len(hf_rnn.GRUModel(config).layers) == 4
    kinds = ["linear_attention", "sliding_attention"]
    hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(**SIZES, layer_types=kinds)).save_pretrained(tmp_path / "hybrid")
    wrong = dict(num_hidden_layers=3, sliding_window=0, rope_theta=float("nan"), num_key_value_heads=3)
    for name, value in wrong.items():
        with pytest.raises(Exception, match=name):
            load(tmp_path / "hybrid", **{name: value})


def test_a_batch_of_no_rows():
    settings = SIZES | dict(layer_types=["sliding_attention"] * 2, sliding_window=3)
    model = hf_rnn.MinGRUForCausalLM(hf_rnn.MinGRUConfig(**settings)).eval()
    assert model(torch.zeros(0, 5, dtype=torch.long)).logits.shape == (0, 5, 61)


def test_conversions_refuse_what_others_have_not():
    kinds = ["linear_attention", "sliding_attention"]
    for settings, name in ((dict(layer_types=kinds), "layer_types"), (dict(block_layout="gated"), "block_layout")):
        with pytest.raises(ValueError, match=f"{name}: transformers' xlstm"):
            to_transformers_config(hf_rnn.XLSTMConfig(hidden_size=16, num_hidden_layers=2, **settings))
    with pytest.raises(ValueError, match="to_torch: torch.nn stacks bare recurrences"):
        hf_rnn.GRUModel(hf_rnn.GRUConfig(hidden_size=16)).to_torch()
    with pytest.raises(ValueError, match="block_layout: not a choice here"):
        hf_rnn.GRUModel.from_torch(torch.nn.GRU(8, 8), block_layout="gated")
    with pytest.raises(ValueError, match="layer_types"):
        hf_rnn.MemoryRNNConfig(layer_types=kinds)
