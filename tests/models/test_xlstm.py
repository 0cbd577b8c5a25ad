"""xLSTM against transformers' own `xlstm` and the `xlstm` package, with the same weights; and what the former lacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import AutoModelForCausalLM, xLSTMConfig

from hf_rnn import XLSTMConfig, XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMModel
from hf_rnn.cli.main import main

SETTINGS = dict(vocab_size=97, hidden_size=128, num_hidden_layers=2, num_heads=2)
LENGTHS = [1, 63, 64, 65, 127, 1000]


def oracle(folder, settings, lengths, *wanted):
    script = Path(__file__).with_name("xlstm_oracle.py")
    command = [sys.executable, script, folder, json.dumps(settings), json.dumps(lengths), *wanted]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One that transformers' class wrote, in several shards, with its logits and what it generates."""
    folder = tmp_path_factory.mktemp("xlstm")
    oracle(folder, SETTINGS, LENGTHS, "logits", "generate")
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    loaded, info = XLSTMForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    return loaded


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (1, length), generator=generator) for length in LENGTHS]


def test_logits(model, checkpoint):
    for ids, expected in zip(prompts(), torch.load(checkpoint / "logits.pt"), strict=True):
        with torch.no_grad():
            logits = model(ids).logits
        assert logits.std() > 0.3
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_generation(model, checkpoint):
    assert model.generation_config.pad_token_id == 1
    for ids, expected in zip(prompts(), torch.load(checkpoint / "generate.pt"), strict=True):
        tokens = model.generate(ids, do_sample=False, min_new_tokens=100, max_new_tokens=100)
        assert torch.equal(tokens, expected)


def test_other_heads_load_it(checkpoint, model):
    assert torch.equal(XLSTMModel.from_pretrained(checkpoint).norm.weight, model.model.norm.weight)
    classifier = XLSTMForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    assert torch.equal(classifier.model.embed_tokens.weight, model.model.embed_tokens.weight)


def weights(folder):
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def test_convert_there_and_back(checkpoint, model, tmp_path):
    assert main(["convert", str(checkpoint), str(tmp_path / "ours")]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(ours) is XLSTMForCausalLM
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))
    assert all(name.startswith(("model.", "lm_head")) for name in weights(tmp_path / "ours"))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    actual, expected = (weights(folder) for folder in (tmp_path / "theirs", checkpoint))
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)
    actual, expected = (xLSTMConfig.from_pretrained(folder) for folder in (tmp_path / "theirs", checkpoint))
    for name in ("hidden_size", "qk_dim", "v_dim", "num_heads", "num_blocks", "gate_soft_cap", "norm_eps", "use_bias"):
        assert getattr(actual, name) == getattr(expected, name), name
    assert not (tmp_path / "theirs" / "modeling_hf_rnn.py").exists()


def test_convert_refuses(checkpoint, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    assert main(["convert", str(checkpoint), str(tmp_path / "full")]) == 1
    assert "not empty" in capsys.readouterr().err
    XLSTMForCausalLM(XLSTMConfig(**SETTINGS, block_layout="neurips")).save_pretrained(tmp_path / "neurips")
    assert main(["convert", str(tmp_path / "neurips"), str(tmp_path / "out")]) == 1
    assert "block_layout" in capsys.readouterr().err


def test_a_config_that_means_something_else(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    changes = [("add_out_norm", False), ("eps", 1e-3), ("use_bias", True), ("weight_mode", "fused")]
    for name, value in changes:
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=name):
            XLSTMConfig.from_pretrained(tmp_path)


def test_other_settings(tmp_path):
    """Sizes, caps and epsilon that are not the defaults; names that an older config has."""
    settings = SETTINGS | dict(num_heads=4, qk_dim_factor=1.0, v_dim_factor=2.0, gate_soft_cap=3.0, norm_eps=1e-3)
    settings |= dict(output_logit_soft_cap=5.0, ffn_proj_factor=1.5, ffn_round_up_to_multiple_of=1)
    oracle(tmp_path, settings, [70], "logits")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"torch_dtype": config.pop("dtype"), "chunkwise_kernel": "chunkwise--of_another_package"}
    del config["hidden_size"], config["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(3, 97, (1, 70), generator=torch.Generator().manual_seed(0))
    logits = XLSTMForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(logits, torch.load(tmp_path / "logits.pt")[0], rtol=0, atol=1e-4)


def test_convert_wants_every_weight(checkpoint, tmp_path, capsys):
    XLSTMForSequenceClassification.from_pretrained(checkpoint).save_pretrained(tmp_path / "classifier")
    assert main(["convert", str(tmp_path / "classifier"), str(tmp_path / "out")]) == 1
    assert "missing keys, such as lm_head.weight" in capsys.readouterr().err
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert main(["convert", str(tmp_path / "junk.pt"), str(tmp_path / "out")]) == 1
    assert "cannot be read as a state dict" in capsys.readouterr().err


def package_model(slstm_at, bias=False, tie=False, dtype=torch.float32):
    torch.manual_seed(0)
    xlstm = pytest.importorskip("xlstm")
    mlstm = xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=4))
    slstm = xlstm.sLSTMBlockConfig(
        slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=4, dtype="float32"),
        feedforward=xlstm.FeedForwardConfig(),
    )
    sizes = dict(vocab_size=50, embedding_dim=64, num_blocks=3, context_length=128)
    config = xlstm.xLSTMLMModelConfig(
        **sizes, slstm_at=slstm_at, bias=bias, tie_weights=tie, mlstm_block=mlstm, slstm_block=slstm
    )
    model = xlstm.xLSTMLMModel(config)
    model.reset_parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "gate" in name or "recurrent" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(2.0)
    return model.eval().to(dtype)


@pytest.mark.parametrize("bias, tie", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("slstm_at", [[], [1], "all"], ids=["mlstm", "mixture", "slstm"])
def test_the_package(slstm_at, bias, tie, tmp_path):
    """In float64 the same, in float32 within 1e-5 of it; blocks of it, too; through `convert`, too."""
    theirs = package_model(slstm_at, bias, tie)
    ours = XLSTMForCausalLM.from_xlstm(theirs.state_dict())
    assert ours.config.tie_word_embeddings == tie
    ids = torch.randint(0, 50, (2, 100))
    expected = package_model(slstm_at, bias, tie, torch.float64)(ids)
    assert relative_error(ours(ids).logits, expected) <= 1e-5
    x = torch.randn(2, 100, 64)
    for block, layer in zip(theirs.double().xlstm_block_stack.blocks, ours.model.layers, strict=True):
        assert relative_error(layer(x), block(x.double())) <= 1e-5
    torch.save(theirs.float().state_dict(), tmp_path / "state.pt")
    assert main(["convert", str(tmp_path / "state.pt"), str(tmp_path / "out")]) == 0
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, ours(ids).logits)
    exact = XLSTMForCausalLM.from_xlstm(theirs.double().state_dict())
    assert (
        exact.dtype == torch.float64 and relative_error(exact(ids).logits, expected) <= 1e-6
    )  # its m starts from -inf


def test_the_packages_other_backend(tmp_path):
    """Its "cuda" sLSTM keeps R transposed and biases head by head; and a file of safetensors."""
    theirs = package_model("all")
    state = theirs.state_dict()
    for name, x in list(state.items()):
        if name.endswith("_recurrent_kernel_"):
            state[name] = x.transpose(1, 2).contiguous()
        elif name.endswith("_bias_"):
            state[name] = x.view(4, 4, 16).transpose(0, 1).flatten()
    save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / "state.safetensors")
    assert main(["convert", str(tmp_path / "state.safetensors"), str(tmp_path / "out")]) == 0
    ids = torch.randint(0, 50, (2, 40))
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert relative_error(logits, theirs(ids)) <= 1e-5


def test_weights_of_something_else():
    with pytest.raises(ValueError, match="xLSTMLMModel"):
        XLSTMForCausalLM.from_xlstm({"weight": torch.zeros(1)})
    blocks = "xlstm_block_stack.blocks."
    for missing, message in (
        ("xlstm_block_stack.post_blocks_norm.weight", "post_blocks_norm"),
        (f"{blocks}0.xlstm.conv1d.conv.weight", "conv1d.conv.weight' in block 0"),
        (f"{blocks}0.xlstm.v_proj.weight", "missing keys, such as model.layers.0.mixer.v_proj"),
    ):
        state = package_model([1]).state_dict()
        del state[missing]
        with pytest.raises(ValueError, match=message):
            XLSTMForCausalLM.from_xlstm(state)
    state = package_model([1]).state_dict()
    name = f"{blocks}1.xlstm.conv1d.conv.weight"
    state[name] = state[name][..., :2]
    with pytest.raises(ValueError, match="one conv_kernel for all blocks"):
        XLSTMForCausalLM.from_xlstm(state)


KINDS = ["linear_attention", "sliding_attention", "linear_attention"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(block_layout="8b"), "block_layout: expected"),
        (dict(slstm_at=[0]), "slstm_at: not with"),
        (dict(block_layout="neurips", slstm_at=[3]), "slstm_at: expected indices from 0 to 2"),
        (dict(block_layout="neurips", slstm_at="some"), "slstm_at: expected indices"),
        (dict(block_layout="gated", slstm_at=[1], layer_types=KINDS), "slstm_at: layer 1 is attention"),
        (dict(num_heads=0), "num_heads: expected at least 1"),
        (dict(qk_size=0), "qk_size: expected a multiple"),
        (dict(qk_size=30), "qk_size: expected a multiple of the 4 heads"),
        (dict(inner_size=64), "inner_size: the blocks of '7b' have no such size"),
        (dict(block_layout="neurips", qkv_block_size=5), "qkv_block_size: expected a divisor"),
        (dict(gate_soft_cap=-1.0), "gate_soft_cap: expected a finite number above 0"),
        (dict(intermediate_size=0), "intermediate_size: expected at least 1"),
        (dict(initializer_range=-1.0), "initializer_range: expected at least 0"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(Exception, match=message):
        XLSTMConfig(**settings)


@pytest.mark.slow
def test_a_mixture_from_the_command_line(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 60)
    config = "block_layout=neurips,hidden_size=32,num_hidden_layers=3,slstm_at=[0,2],norm_eps=1e-4"
    options = ["--block_size", "32", "--max_steps", "2", "--use_cpu", "True", "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--model", "xlstm", "--data", str(tmp_path / "text.txt"), "--config", config, *options]) == 0
    saved = XLSTMConfig.from_pretrained(tmp_path / "out")
    assert saved.slstm_blocks == [0, 2] and saved.epsilon == 1e-4


# What goes wrong in transformers' class, one by one (its modeling file and issues; version 5.23)

LAYOUTS = {
    "7b": dict(),
    "neurips": dict(block_layout="neurips"),
    "mixture": dict(block_layout="neurips", slstm_at=[1]),
}


@pytest.fixture(params=LAYOUTS)
def small(request):
    torch.manual_seed(0)
    return XLSTMForCausalLM(XLSTMConfig(**SETTINGS | dict(pad_token_id=1), **LAYOUTS[request.param]))


def test_trains_with_default_arguments_at_any_length(small):
    """There: an error about in-place operations, lengths that 64 must divide."""
    for time in (1, 7, 63, 64, 130):
        small.zero_grad()
        ids = torch.randint(3, 97, (2, time))
        small.train()(ids, labels=ids).loss.backward()
        if time > 1:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_every_block_learns_in_evaluation_mode_at_any_length(small):
    """There: above max_inference_chunksize the blocks run without gradients, silently."""
    for name, parameter in small.named_parameters():
        if name.endswith("gate_proj.weight"):
            torch.nn.init.normal_(parameter)
    small.eval()(torch.randint(3, 97, (1, 600)), use_cache=True).logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in small.parameters())


def test_tied_embeddings(tmp_path):
    """There: silently not tied."""
    model = XLSTMForCausalLM(XLSTMConfig(**SETTINGS, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = XLSTMForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_initialisation(small):
    """The papers'. There: everything with "gate" in its name is zero, the feed-forward's too, which then gives zero."""
    small_init, output = (2 / (5 * 128)) ** 0.5, 2 / 2 / 128**0.5
    for name, parameter in small.named_parameters():
        last = name.rpartition(".")[0].rpartition(".")[2]
        if last in ("out_proj", "down_proj"):
            assert 0.9 * output < parameter.std() < 1.1 * output, name
        elif name.endswith(("gate_proj.weight", "recurrent_weight")):
            assert not parameter.any(), name
        elif parameter.dim() > 1 and last != "conv":
            assert 0.9 * small_init < parameter.std() < 1.1 * small_init, name
        elif "norm" in name or name.endswith("skip"):
            assert (parameter == 1).all(), name
        elif name.endswith("gate_proj.bias"):
            assert parameter[2:].tolist() == [3.0, 6.0], name
            assert (parameter[:2] == -10).all() or parameter[:2].abs().max() < 0.5, name
        elif name.endswith("recurrent_bias"):
            i, f, z, o = parameter.view(2, 4, 64).unbind(1)
            assert not i.any() and not z.any() and not o.any() and f[0, 0] == 5 and f[0, -1] == -7, name
    x = torch.randn(1, 5, 128)
    assert all(layer(x).sub(x).abs().max() > 0.01 for layer in small.model.layers)


def test_left_padding_and_ragged_prompts(small):
    """There: the mask is ignored."""
    model = small.eval()
    rows = [torch.randint(3, 97, (length,)) for length in (3, 70, 64)]
    ids = torch.full((3, 70), 1)
    mask = torch.zeros(3, 70, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, 70 - len(row) :], mask[n, 70 - len(row) :] = row, 1
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        options = dict(do_sample=False, min_new_tokens=20, max_new_tokens=20)
        tokens = model.generate(ids, attention_mask=mask, **options)
        for n, row in enumerate(rows):
            torch.testing.assert_close(logits[n, 70 - len(row) :], model(row[None]).logits[0], rtol=0, atol=1e-4)
            assert torch.equal(tokens[n, 70:], model.generate(row[None], **options)[0, len(row) :])


def test_beams(small):
    """There: a ValueError."""
    ids = torch.randint(3, 97, (2, 9))
    options = dict(num_beams=3, do_sample=False, min_new_tokens=8, max_new_tokens=8)
    cached = small.eval().generate(ids, **options)
    assert torch.equal(cached, small.generate(ids, use_cache=False, **options))


def kl(logits, expected):
    log_p, log_q = (x.double().log_softmax(-1) for x in (expected, logits))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state_stays_float32_in_a_bfloat16_model(layout):
    """600 tokens one by one. With the state rounded after each the KL to float32 would be 3.3 to 6.2 times as large."""
    torch.manual_seed(0)
    model = XLSTMForCausalLM(XLSTMConfig(**SETTINGS, **LAYOUTS[layout])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_proj.bias"):
                parameter[:2], parameter[2:] = 0.0, 6.0
            elif parameter.dim() == 2:
                parameter.mul_(2.0)
    ids = torch.randint(3, 97, (1, 600))
    with torch.no_grad():
        exact = model(ids).logits
        model.bfloat16()
        whole = model(ids).logits
        state, steps = None, []
        for t in range(600):
            output = model(ids[:, t : t + 1], past_key_values=state, use_cache=True)
            state = output.past_key_values
            steps.append(output.logits)
    assert all(x.dtype == torch.float32 for layer in state.states for x in layer)
    assert kl(torch.cat(steps, 1), exact) <= 1.2 * kl(whole, exact)


@pytest.mark.parametrize("settings", [dict(block_layout="7b"), dict(block_layout="neurips", slstm_at=[1])])
@pytest.mark.parametrize("norm", [spectral_norm, weight_norm])
def test_a_norm_of_weights_that_start_at_zero(settings, norm):
    """It would be NaN; of other values it works."""
    model, ids = XLSTMForCausalLM(XLSTMConfig(**SETTINGS | settings)), torch.arange(12).view(2, 6)
    slstm = "slstm_at" in settings
    mixer = model.model.layers[1].mixer
    module, name = (mixer, "recurrent_weight") if slstm else (mixer.gate_proj, "weight")
    weight = getattr(module, name)
    norm(module, name)
    with pytest.raises(ValueError, match=f"{name}: NaN.*starts at zero"):
        model(ids)
    parametrize.remove_parametrizations(module, name)
    setattr(module, name, torch.nn.Parameter(torch.randn_like(weight)))
    norm(module, name)
    assert model(ids).logits.isfinite().all()
