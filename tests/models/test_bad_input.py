"""Each mistake gets an error that names the argument and what was expected."""

import pytest
import torch
from conftest import ARCHITECTURES, skip_if_not_its_settings
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from hf_rnn import MinGRUConfig, RecurrentCache


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda ids: dict(input_ids=ids + 100), IndexError, r"input_ids: expected ids in \[0, 61\).* got 1"),
        (lambda ids: dict(input_ids=ids - 100), IndexError, r"input_ids: expected ids in \[0, 61\).* got -"),
        (lambda ids: dict(input_ids=ids.float()), TypeError, "input_ids: expected integer"),
        (lambda ids: dict(input_ids=ids[0]), ValueError, r"input_ids: expected shape \(B, T\)"),
        (lambda ids: dict(), ValueError, "exactly one"),
        (lambda ids: dict(input_ids=ids, inputs_embeds=torch.zeros(3, 17, 16)), ValueError, "exactly one"),
        (lambda ids: dict(inputs_embeds=torch.zeros(3, 17, 15)), ValueError, "inputs_embeds: expected shape"),
        (lambda ids: dict(input_ids=ids, attention_mask=torch.ones(3, 16)), ValueError, "attention_mask: expected"),
        (lambda ids: dict(input_ids=ids, attention_mask=torch.ones(3, 1, 17, 17)), ValueError, "attention_mask: exp"),
        (lambda ids: dict(input_ids=ids, position_ids=torch.zeros(2, 17)), ValueError, "position_ids: expected shape"),
        (lambda ids: dict(input_ids=ids[:1], cu_seq_lens_q=torch.tensor([0, 18])), ValueError, "cu_seq_lens_q: expect"),
        (lambda ids: dict(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 17])), ValueError, "cu_seq_lens_q: packed"),
        (lambda ids: dict(input_ids=ids, labels=ids + 100), IndexError, "labels: expected ids"),
        (lambda ids: dict(input_ids=ids, labels=ids - 90), IndexError, "labels: expected ids"),
        (lambda ids: dict(input_ids=ids, past_key_values=DynamicCache()), TypeError, "past_key_values: expected a Rec"),
        (lambda ids: dict(input_ids=ids, past_key_values=RecurrentCache(3)), ValueError, "state of 2 layers"),
    ],
)
def test_forward(model, ids, arguments, error, message):
    with pytest.raises(error, match=message):
        model(**arguments(ids))


def test_ignored_labels_are_fine(model, ids):
    assert torch.isfinite(model(ids, labels=ids.masked_fill(ids > 30, -100)).loss)
    model(ids, labels=torch.full_like(ids, -100))


def test_a_cache_of_another_model_or_batch(make_model, model, ids):
    other = make_model(hidden_size=24)
    with pytest.raises(ValueError, match=r"past_key_values: expected states of shapes \[\(3, .*got \[\(3, "):
        model(ids, past_key_values=other(ids).past_key_values)
    with pytest.raises(ValueError, match="past_key_values: expected states"):
        model(ids[:2], past_key_values=model(ids).past_key_values)
    with pytest.raises(ValueError, match="pass no cache"):
        state = model(ids[:1]).past_key_values
        model(ids[:1], past_key_values=state, cu_seq_lens_q=torch.tensor([0, 17]))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(hidden_size=0), "hidden_size: expected at least 1"),
        (dict(num_hidden_layers=-1), "num_hidden_layers"),
        (dict(hidden_size="big"), "hidden_size"),
        (dict(conv_kernel=1), "conv_kernel"),
        (dict(hidden_dropout=1.5), "hidden_dropout"),
        (dict(output_projection=False, expansion_factor=2), "output_projection"),
        (dict(expansion_factor=0.001), "expansion_factor"),
        (dict(hiden_size=4), "did you mean 'hidden_size'"),
    ],
)
def test_config(architecture, settings, message):
    skip_if_not_its_settings(architecture, settings, allowed={"hiden_size"})
    with pytest.raises(Exception, match=message):
        ARCHITECTURES[architecture][0](**settings)


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
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size|mismatch|shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path, hidden_size=24)


def test_unknown_architecture():
    with pytest.raises(AttributeError, match="no attribute 'MinGPU'"):
        import hf_rnn

        hf_rnn.MinGPU  # noqa: B018


def test_config_survives_a_round_trip(tmp_path):
    config = MinGRUConfig(hidden_size=24, expansion_factor=1.5, forget_bias=2)
    config.save_pretrained(tmp_path)
    assert MinGRUConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
