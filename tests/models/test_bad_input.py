# ruff: noqa: PT017  both outcomes are looked at
"""Each mistake gets an error that names the argument and what was expected."""

import re

import pytest
import torch
from conftest import ARCHITECTURES, LAYOUTS, for_those_that_have
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import hf_rnn
from hf_rnn import MinGRUConfig, MinLSTMConfig, MinLSTMForCausalLM, RecurrentCache
from hf_rnn.skeleton.inputs import padding_mask
from hf_rnn_kernels import SequenceLayout, gru_scan, lstm_scan, min_gru_scan


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda ids: dict(input_ids=ids + 100), IndexError, r"input_ids: expected ids in \[0, 61\).* got 1"),
        (lambda ids: dict(input_ids=ids - 100), IndexError, r"input_ids: expected ids in \[0, 61\).* got -"),
        (lambda ids: dict(input_ids=ids.float()), TypeError, "input_ids: expected integer"),
        (lambda ids: dict(input_ids=ids.tolist()), TypeError, "input_ids: expected a tensor, got list"),
        (lambda ids: dict(input_ids=ids, attention_mask=ids.numpy()), TypeError, "attention_mask: expected a tensor"),
        (lambda ids: dict(input_ids=ids, labels=ids.tolist()), TypeError, "labels: expected a tensor, got list"),
        (lambda ids: dict(input_ids=ids[0]), ValueError, r"input_ids: expected shape \(B, T\)"),
        (lambda ids: dict(), ValueError, "exactly one"),
        (lambda ids: dict(input_ids=ids, inputs_embeds=torch.zeros(3, 17, 16)), ValueError, "exactly one"),
        (lambda ids: dict(inputs_embeds=torch.zeros(3, 17, 15)), ValueError, "inputs_embeds: expected shape"),
        (lambda ids: dict(input_ids=ids, attention_mask=torch.ones(3, 16)), ValueError, "attention_mask: expected"),
        (lambda ids: dict(input_ids=ids, attention_mask=torch.ones(3, 1, 17, 17)), ValueError, "attention_mask: exp"),
        (lambda ids: dict(input_ids=ids, attention_mask=1 + (ids > 9).int()), ValueError, "attention_mask: .* zeros"),
        (lambda ids: dict(input_ids=ids, attention_mask=-1 * (ids > 9).long()), ValueError, "attention_mask: .* zeros"),
        (lambda ids: dict(input_ids=ids, position_ids=torch.zeros(2, 17)), ValueError, "position_ids: expected shape"),
        (lambda ids: dict(input_ids=ids[:1], cu_seq_lens_q=torch.tensor([0, 18])), ValueError, "cu_seq_lens_q: expect"),
        (lambda ids: dict(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 17])), ValueError, "cu_seq_lens_q: packed"),
        (lambda ids: dict(input_ids=ids, labels=ids + 100), IndexError, "labels: expected ids"),
        (lambda ids: dict(input_ids=ids, labels=ids - 90), IndexError, "labels: expected ids"),
        (lambda ids: dict(input_ids=ids, past_key_values=DynamicCache()), TypeError, "cache: expected a Rec"),
        (lambda ids: dict(input_ids=ids, past_key_values=RecurrentCache(3)), ValueError, "state of 2 layers"),
    ],
)
def test_forward(model, ids, arguments, error, message):
    with pytest.raises(error, match=message):
        model(**arguments(ids))


PACKED = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])


def test_a_mask_that_numbers_sequences_is_refused(architecture, make_model):
    """Read as ones they would see each other: by the language model, its classifier, and where the past is in front."""
    config, _, classifier = LAYOUTS[architecture]
    ids = torch.arange(8)[None]
    models = make_model(), classifier(config(vocab_size=61, hidden_size=16)).eval()
    for model in models:
        for mask in (PACKED, PACKED.to(torch.uint8), 0.5 * PACKED):
            with pytest.raises(ValueError, match="attention_mask: .*position_ids"):
                model(ids, attention_mask=mask)
        assert torch.equal(model(ids, attention_mask=PACKED > 0).logits, model(ids).logits)
    state = models[0](ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask: .*position_ids"):
        models[0](ids[:, 4:], attention_mask=PACKED.flip(1), past_key_values=state)


def test_a_mask_that_numbers_sequences_is_refused_in_a_graph():
    mask = torch.compile(lambda mask: padding_mask(mask, 1, 8, 0), backend="aot_eager", fullgraph=True)
    assert torch.equal(mask(PACKED.clamp(max=1)), torch.ones(1, 8, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="attention_mask: expected zeros at padding"):
        mask(PACKED)


def test_ignored_labels_are_fine(model, ids):
    assert torch.isfinite(model(ids, labels=ids.masked_fill(ids > 30, -100)).loss)
    model(ids, labels=torch.full_like(ids, -100))


def test_a_cache_of_another_model_or_batch(make_model, model, ids):
    other = make_model(hidden_size=24)
    with pytest.raises(ValueError, match=r"cache: expected states of shapes \[\(3, .*got \[\(3, "):
        model(ids, past_key_values=other(ids).past_key_values)
    with pytest.raises(ValueError, match="cache: expected the state of a batch of 2"):
        model(ids[:2], past_key_values=model(ids).past_key_values)
    with pytest.raises(ValueError, match="cache: seq_idx and cu_seq_lens_q do not say whether the first"):
        state = model(ids[:1]).past_key_values
        model(ids[:1], past_key_values=state, cu_seq_lens_q=torch.tensor([0, 17]))


ATTENTION = ["sliding_attention"] * 3


@pytest.mark.parametrize(
    "architecture, settings, message",
    for_those_that_have(
        (dict(hidden_size=0), "hidden_size: expected at least 1"),
        (dict(num_hidden_layers=-1), "num_hidden_layers"),
        (dict(hidden_size="big"), "hidden_size"),
        (dict(conv_kernel=1), "conv_kernel"),
        (dict(hidden_dropout=1.5), "hidden_dropout"),
        (dict(output_projection=False, expansion_factor=2), "output_projection"),
        (dict(expansion_factor=0.001), "expansion_factor"),
        (dict(norm_eps=-1.0), "norm_eps"),
        (dict(forget_bias=float("nan")), "forget_bias"),
        (dict(block_layout="griffin"), "block_layout: expected '"),
        (dict(block_layout="gated", residual=False, conv_kernel=0), "block_layout: 'gated' adds to a residual stream"),
        (dict(layer_types=["linear_attention"] * 2), "layer_types: expected one for each of the 3 layers .*got 2"),
        (dict(layer_types=["full_attention"] * 3), "layer_types: expected 'linear_attention' or 'sliding_attention'"),
        (dict(layer_types=ATTENTION, num_attention_heads=7), "num_attention_heads: .*384, got 7"),
        (dict(layer_types=ATTENTION, num_attention_heads=384), "num_attention_heads: expected heads of an even number"),
        (dict(layer_types=ATTENTION, num_key_value_heads=3), "num_key_value_heads: expected a divisor of the 4 heads"),
        (dict(layer_types=ATTENTION, sliding_window=0), "sliding_window: expected at least 1 token"),
        (dict(layer_types=ATTENTION, sliding_window=10**12), "sliding_window: expected .* at most"),
        (dict(layer_types=ATTENTION, rope_theta=0.5), "rope_theta: expected"),
        (dict(layer_types=ATTENTION, rope_theta=10**400), "rope_theta: expected"),
        (dict(expansion_factor=float("nan")), "expansion_factor: expected a finite number"),
        (dict(layer_types=ATTENTION, residual=False, conv_kernel=0), "layer_types: attention adds to a residual"),
    ),
)
def test_config(architecture, settings, message):
    with pytest.raises(Exception, match=message):
        LAYOUTS[architecture][0](**settings)


def test_a_misspelt_setting(architecture):
    with pytest.raises(Exception, match="did you mean 'hidden_size'"):
        LAYOUTS[architecture][0](hiden_size=4)


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "missing tensor"])
def test_damaged_weights(model, tmp_path, damage):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "header":
        path.write_bytes(b"\xff" * 8 + data[8:])
    else:
        path.unlink()
    with pytest.raises((OSError, ValueError), match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_shape(model, tmp_path):
    """Of a model with a head and of a backbone, read as either."""
    for i, saved in enumerate((model, model.model)):
        saved.save_pretrained(tmp_path / str(i))
        for auto in (AutoModel, AutoModelForCausalLM):
            with pytest.raises(RuntimeError, match=r"model.safetensors: .* expected shape \[.*\], got \["):
                auto.from_pretrained(tmp_path / str(i), hidden_size=24)


@pytest.mark.parametrize(
    "told, message",
    [
        (dict(bidirectional=True), "weights are missing, .* told otherwise .*: bidirectional=True, there False"),
        (dict(num_hidden_layers=3), "num_hidden_layers=3, there 2"),
        ({}, "the checkpoint is damaged"),
    ],
)
def test_weights_that_another_config_would_need(told, message, tmp_path):
    """As settings, and as a config; without either it is the file that is wrong."""
    model = hf_rnn.GRUForCausalLM(hf_rnn.GRUConfig(hidden_size=16, num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    if not told:
        weights = {name: x for name, x in model.state_dict().items() if "layers.1" not in name}
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for options in (told, {"config": hf_rnn.GRUConfig(**dict(hidden_size=16, num_hidden_layers=2) | told)}):
        for head in (hf_rnn.GRUForTokenClassification, hf_rnn.GRUModel):
            with pytest.raises(ValueError, match=message):
                head.from_pretrained(tmp_path, **options)


def test_unknown_architecture():
    with pytest.raises(AttributeError, match="no attribute 'MinGPU'"):
        import hf_rnn

        hf_rnn.MinGPU  # noqa: B018


def test_config_survives_a_round_trip(tmp_path):
    config = MinGRUConfig(hidden_size=24, expansion_factor=1.5, forget_bias=2)
    config.save_pretrained(tmp_path)
    assert MinGRUConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def special_tokens(config):
    return config.pad_token_id, config.bos_token_id, config.eos_token_id


def test_special_tokens_are_the_byte_vocabularys_alone(architecture, tmp_path, capfd):
    """And what is told stays, None included, through a saved config."""
    make = LAYOUTS[architecture][0]
    assert special_tokens(make()) == (256, 257, 258)
    assert special_tokens(make(vocab_size=300)) == special_tokens(make(vocab_size=64)) == (None, None, None)
    assert "within the vocabulary" not in capfd.readouterr().err, "transformers would warn of each"
    for told in (
        make(),
        make(vocab_size=300, pad_token_id=256),
        make(pad_token_id=None, eos_token_id=[3, 258]),
        make(vocab_size=64, bos_token_id=0),
        make(pad_token_id=None, bos_token_id=None, eos_token_id=None),
    ):
        told.save_pretrained(tmp_path)
        assert special_tokens(type(told).from_pretrained(tmp_path)) == special_tokens(told)


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_ordinary_tokens_of_another_vocabulary(architecture):
    """Token 256 of 300 is none of padding, and 258 ends nothing."""
    config, causal, classifier = LAYOUTS[architecture]
    config = config(vocab_size=300, hidden_size=16, num_hidden_layers=1)
    ids = torch.tensor([[3, 256], [4, 5]])
    model = classifier(config).eval()
    assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)
    generation = causal(config).generation_config
    assert generation.eos_token_id is None and generation.pad_token_id is None


def tensors(draw, shapes, dtypes=(torch.int64, torch.int32, torch.float32, torch.bool, torch.uint8)):
    """A tensor of one of the shapes, its numbers between anything and sense."""
    low, high = draw(st.sampled_from([(0, 2), (0, 61), (-101, 70), (-(2**31), 2**31 - 1)]))
    size = draw(st.sampled_from(shapes))
    x = torch.randint(low, high, size, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return x.to(draw(st.sampled_from(dtypes)))


@pytest.fixture(scope="module")
def small_models():
    sizes = dict(vocab_size=61, hidden_size=16, num_hidden_layers=1, pad_token_id=58)
    return [ARCHITECTURES[name][1](ARCHITECTURES[name][0](**sizes)).eval() for name in ("gru", "mingru", "xlstm")]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_arguments(small_models, data):
    """Of any shape and content: outputs of the right shape, or an error that names an argument; never a crash."""
    draw, model = data.draw, data.draw(st.sampled_from(small_models))
    batch, time = draw(st.sampled_from([(1, 7), (2, 5), (1, 1), (3, 0), (0, 4)]))
    near = [
        (batch, time),
        (batch, time + 2),
        (1, time),
        (batch,),
        (batch, time, 1),
        (time, batch),
        (),
        (0,),
        (3,),
        (9,),
    ]
    ids = torch.randint(0, 61, (batch, time)) if draw(st.booleans()) else tensors(draw, near)
    arguments = dict(input_ids=ids)
    for name in ("attention_mask", "position_ids", "labels", "cu_seq_lens_q", "seq_idx"):
        if draw(st.integers(0, 3)) == 0:
            arguments[name] = tensors(draw, near)
    if draw(st.integers(0, 4)) == 0:
        other = draw(st.sampled_from(small_models))
        arguments["past_key_values"] = other(torch.zeros(draw(st.sampled_from([1, 2])), 2).long()).past_key_values
    try:
        with torch.no_grad():
            logits = model(**arguments).logits
    except (ValueError, TypeError, IndexError) as error:
        assert re.match(r"(input_ids|inputs_embeds|use_cache|cache|" + "|".join(arguments) + r")\b.*: ", str(error)), (
            error
        )
    else:
        assert logits.shape == (*ids.shape, 61) and logits.isfinite().all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(offsets=st.lists(st.integers(-3, 14) | st.integers(-(2**62), 2**62), max_size=6), wide=st.booleans())
def test_any_offsets(offsets, wide):
    """Straight at the operators, whose loops write by them."""
    offsets = torch.tensor(offsets, dtype=torch.int64)
    offsets = offsets if wide else offsets.to(torch.int32)
    x, weight = torch.randn(1, 11, 12), torch.randn(1, 12, 4)
    right = offsets.tolist()
    right = len(right) > 1 and right[0] == 0 and right[-1] == 11 and right == sorted(right)
    for scan in (
        lambda: min_gru_scan(x, x, None, SequenceLayout(None, offsets)),
        lambda: lstm_scan(torch.randn(1, 11, 16), torch.randn(1, 16, 4), layout=SequenceLayout(None, offsets)),
        lambda: gru_scan(x, weight, layout=SequenceLayout(None, offsets)),
    ):
        if right:
            assert scan()[0].isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"cu_seqlens: expected"):
                scan()


def test_masks_of_another_length_or_of_biases(model, ids):
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        model(ids, attention_mask=torch.ones(3, 30))
    with pytest.raises(ValueError, match="attention_mask: expected zeros"):
        model(ids, attention_mask=torch.zeros(3, 17) - 1e4)
    state = model(ids, use_cache=True).past_key_values
    model(ids[:, :3], attention_mask=torch.ones(3, 20), past_key_values=state)


def test_a_cache_of_another_architecture(ids):
    settings = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2)
    gru = ARCHITECTURES["mingru"][1](MinGRUConfig(**settings)).eval()
    with pytest.raises(ValueError, match="expected the state of a hf_rnn_minlstm"):
        MinLSTMForCausalLM(MinLSTMConfig(**settings)).eval()(ids, past_key_values=gru(ids).past_key_values)


def test_labels_of_another_shape(model, ids):
    with pytest.raises(ValueError, match="labels: expected the shape"):
        model(ids, labels=ids.t().contiguous())
    with pytest.raises(ValueError, match="logits_to_keep=0"):
        model(ids, labels=ids, logits_to_keep=1)
    torch.testing.assert_close(model(ids, labels=ids.int()).loss, model(ids, labels=ids).loss)


def test_classifier_rows(architecture, ids):
    config_class, _, classifier_class = LAYOUTS[architecture]
    model = classifier_class(config_class(vocab_size=61, hidden_size=16, pad_token_id=58)).eval()
    with pytest.raises(ValueError, match="row of padding only"):
        model(torch.full_like(ids, 58))
    with pytest.raises(ValueError, match="one sequence a row"):
        model(ids, position_ids=torch.arange(17)[None] % 5)
    left = torch.cat([torch.full((3, 4), 58), ids], 1)
    torch.testing.assert_close(model(left).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
