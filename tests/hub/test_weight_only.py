"""Weights of 8 and 4 bits by transformers' own ways: loading, saving, refusing, going on from coded checkpoints."""

import copy
import json
import warnings

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_rnn
from hf_rnn import WeightOnlyConfig
from hf_rnn.compression.weight_only import pack_model
from hf_rnn_kernels import threads
from hf_rnn_kernels.packed_linear import PackedLinear, PackedMatrix
from hf_rnn_trainers.model_card import make_card


@pytest.fixture
def folder(make_model, tmp_path):
    make_model(hidden_size=32).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(folder, *bits, **options):
    settings = dict(quantization_config=WeightOnlyConfig(*bits)) if bits else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings | options)
    assert not any(module.training for module in model.modules()), "as transformers leaves it, or tokens are slow"
    return model


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedMatrix)}


def weight_of(model, name):
    parameters = dict(model.named_parameters())
    return parameters[name] if name in parameters else parameters[f"{name}.weight"]


@torch.no_grad()
def test_loaded_saved_and_loaded(folder, ids, tmp_path):
    """The same numbers again, in a fraction of the bytes; a token by the compiled call and by the ordinary path."""
    plain = load(folder)
    expected = plain(ids).logits
    for bits, bound in ((8, 0.06), (4, 0.9)):
        model = load(folder, bits)
        assert model.is_quantized and model.quantization_method == "hf_rnn_packed"
        logits = model(ids).logits
        assert 0 < relative_error(logits, expected) < bound
        model.save_pretrained(tmp_path / str(bits))
        again = load(tmp_path / str(bits))
        assert model.decoding == again.decoding == plain.decoding
        assert layers(again).keys() == layers(model).keys() and layers(model)
        assert torch.equal(again(ids).logits, logits)
        packed = {name: x.numel() for name, x in again.state_dict().items() if name.endswith(".packed")}
        weights = {name: weight_of(plain, name.removesuffix(".packed")).numel() for name in packed}
        assert packed == {name: count * bits // 8 for name, count in weights.items()}
        many = ids.repeat(3, 1)  # of 9 rows no activation is rounded, of one they are to 16 bits
        for rows, closer in ((many, 2e-5), (ids[:1], 2e-4)):
            state = model(rows[:, :9], use_cache=True).past_key_values
            steps = [model(input_ids=rows[:, t : t + 1], past_key_values=state).logits for t in range(9, 17)]
            assert relative_error(torch.cat(steps, 1), logits.repeat(3, 1, 1)[: len(rows), 9:]) < closer
        restored = again.dequantize()
        assert not layers(restored) and not restored.is_quantized
        assert relative_error(restored(ids).logits, logits) < 1e-5


@torch.no_grad()
def test_from_a_coded_checkpoint(make_model, ids, tmp_path):
    """Integers that were coded stay integers: bit for bit the weights that are decoded, and what does not fit stays."""
    model = make_model(hidden_size=32)
    hf_rnn.save_compressed(model, tmp_path / "coded", step=2.0**-6)
    plain = load(tmp_path / "coded")
    for bits in (8, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packed = load(tmp_path / "coded", bits)
        found = layers(packed)
        assert found or bits == 4
        for name, layer in found.items():
            weight = layer.dequantize()
            assert torch.equal(getattr(weight, "weight", weight), weight_of(plain, name))
        for name, p in packed.named_parameters():
            assert torch.equal(p, plain.get_parameter(name))
        assert relative_error(packed(ids).logits, plain(ids).logits) < 1e-5
        packed.save_pretrained(tmp_path / f"again{bits}")
        assert torch.equal(load(tmp_path / f"again{bits}")(ids).logits, packed(ids).logits)
    assert packed.config.quantization_config.packed == list(found)


@pytest.mark.parametrize("architecture", ["xlstm", "minlstm"], indirect=True)
def test_what_stays_plain(make_model, tmp_path):
    make_model(tie_word_embeddings=True, hidden_size=32).save_pretrained(tmp_path)
    names = set(layers(load(tmp_path, 8)))
    assert "lm_head" not in names, "tied to the embedding"
    assert "model.layers.0.mixer.gate_proj" not in names or "xlstm" not in str(tmp_path)
    kept = dict(modules_to_not_convert=["out_proj", "model.layers.1.mixer.in_proj"])
    config = WeightOnlyConfig(4, 8, **kept)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    left = names - {n for n in names if n.endswith("out_proj")} - {"model.layers.1.mixer.in_proj"}
    assert set(layers(model)) == left
    assert all(layer.group_size == 8 for layer in layers(model).values())


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_as_they_are(make_model, ids, tmp_path, dtype):
    """What makes a model's numbers smaller leaves those of packed layers alone: moving, saving, loading."""
    make_model(hidden_size=32).to(dtype).save_pretrained(tmp_path / "plain")
    packed = load(tmp_path / "plain", 8)
    packed.save_pretrained(tmp_path / "packed")
    for other in (load(tmp_path / "packed"), copy.deepcopy(packed).to(torch.float32).to(dtype)):
        for name, layer in layers(other).items():
            assert torch.equal(layer.scale, packed.get_submodule(name).scale) and layer.scale.dtype == torch.float32
        assert torch.equal(other(ids).logits, packed(ids).logits)


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_from_a_backbone(make_model, ids, tmp_path):
    """Its packed layers in a model with a head of its own."""
    make_model(hidden_size=32).save_pretrained(tmp_path / "plain")
    backbone = hf_rnn.GRUModel.from_pretrained(tmp_path / "plain", quantization_config=WeightOnlyConfig(8))
    backbone.save_pretrained(tmp_path / "packed")
    for kind in (hf_rnn.GRUForCausalLM, hf_rnn.GRUForSequenceClassification):
        model = kind.from_pretrained(tmp_path / "packed")
        assert torch.equal(model.model(ids).last_hidden_state, backbone(ids).last_hidden_state)


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_refused_with_a_reason(folder, tmp_path):
    model = load(folder, 8)
    for refused in (
        lambda: pack_model(model, WeightOnlyConfig(4)),
        lambda: hf_rnn.prune(model, 0.5),
        lambda: hf_rnn.save_compressed(model, tmp_path / "coded"),
        lambda: model.resize_token_embeddings(70),
    ):
        with pytest.raises(ValueError, match=r"dequantize\(\)"):
            refused()
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed in 8 bits, asked for are 4"):
        load(tmp_path / "packed", 4)
    with pytest.raises(ValueError, match="modules_to_not_convert: .* named 'lm_heat'"):
        load(folder, 8, None, ["lm_heat"])
    hf_rnn.save_compressed(load(folder), tmp_path / "coded", step=2.0**-6)
    as_dict = dict(quant_method="hf_rnn_packed", bits=8)
    assert layers(AutoModelForCausalLM.from_pretrained(tmp_path / "coded", quantization_config=as_dict))


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_bad_input(make_model, folder, tmp_path):
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 5"):
        WeightOnlyConfig(bits=5)
    with pytest.raises(ValueError, match="packed: expected a list of names"):
        WeightOnlyConfig(packed="lm_head")
    with pytest.raises(ValueError, match=r"group_size: expected a divisor of the 32 inputs of model.layers.0.*, got 7"):
        load(folder, 8, 7)
    load(folder, 4).save_pretrained(tmp_path / "packed")
    good, file = load_file(tmp_path / "packed/model.safetensors"), tmp_path / "packed/model.safetensors"
    name = next(name for name in good if name.endswith("out_proj.packed"))
    scale = name.replace("packed", "scale_bits")

    def damaged(**changes):
        save_file({**good, **changes}, file, metadata={"format": "pt"})
        return lambda: load(tmp_path / "packed")

    with pytest.raises((RuntimeError, ValueError), match=name):  # by transformers, or where it loads it by us
        damaged(**{name: good[name][:, :-1].contiguous()})()
    with pytest.raises(ValueError, match=f"{scale.removesuffix('_bits')}: expected finite numbers"):
        damaged(**{scale: torch.full_like(good[scale], -1)})()
    save_file({n: x for n, x in good.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 of the weights are missing"):
        load(tmp_path / "packed")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"]["packed"].append("model.nowhere")
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    damaged()
    with pytest.raises(ValueError, match="no linear layer of this model is named 'model.nowhere'"):
        load(tmp_path / "packed")
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "infinite")
    with pytest.raises(ValueError, match="lm_head: expected finite weights"):
        load(tmp_path / "infinite", 8)


@pytest.mark.parametrize("architecture", ["mingru"], indirect=True)
def test_training_is_refused_and_lora_on_top_is_not(folder, ids, tmp_path):
    model = load(folder, 8)
    arguments = TrainingArguments(tmp_path, report_to="none", max_steps=3, use_cpu=True, learning_rate=0.1)
    rows = [dict(input_ids=row, labels=row) for row in ids]
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=rows)
    peft = pytest.importorskip("peft")
    before = {name: layer.packed.clone() for name, layer in layers(model).items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj", "out_proj"]))
    with torch.no_grad():
        expected = adapted(ids).logits
    hf_rnn.RecurrentTrainer(adapted, arguments, train_dataset=rows).train()
    with torch.no_grad():
        adapted.eval()
        assert relative_error(adapted(ids).logits, expected) > 1e-3
        tokens = adapted.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(
            tokens,
            adapted.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False),
        )
    assert all(torch.equal(layer.packed, before[name.removeprefix("base_model.model.").replace(".base_layer", "")])
               for name, layer in layers(adapted).items())  # fmt: skip
    with pytest.raises(RuntimeError):
        adapted.merge_and_unload()


@pytest.mark.parametrize("architecture", ["gru"], indirect=True)
def test_the_card_says_so(folder):
    plain, packed = load(folder), load(folder, 4)
    card = make_card("me/packed", packed).content
    assert "integers of 4 bits" in card and "`model.dequantize()`" in card
    assert f"{plain.num_parameters():,} parameters" in card


@pytest.mark.parametrize("architecture", ["lstm"], indirect=True)
def test_a_backbone_and_copies(folder, ids, tmp_path):
    load(folder, 8).save_pretrained(tmp_path / "packed")
    whole, backbone = load(tmp_path / "packed"), hf_rnn.LSTMModel.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = whole.model(ids).last_hidden_state
        assert torch.equal(backbone(ids).last_hidden_state, expected)
        assert torch.equal(copy.deepcopy(whole)(ids).logits, whole(ids).logits)
    assert whole.decoding == ("fused" if threads.available() else whole.decoding)
