import gc
import os
from dataclasses import fields
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import hf_rnn
from hf_rnn_kernels import SequenceLayout

ARCHITECTURES = {
    stem.lower(): [getattr(hf_rnn, stem + suffix) for suffix in ("Config", "ForCausalLM", "ForSequenceClassification")]
    for stem in hf_rnn.ARCHITECTURES
}


def attention_in_every_second_layer(num_hidden_layers=3, **settings):
    kinds = ["sliding_attention", "linear_attention"] * num_hidden_layers
    settings = dict(layer_types=kinds[:num_hidden_layers], sliding_window=5, num_key_value_heads=2) | settings
    return hf_rnn.MinLSTMConfig(num_hidden_layers=num_hidden_layers, **settings)


# The architectures, and others of their layouts, which pass the same tests in the slow tier
LAYOUTS = ARCHITECTURES | {
    "gru-paper": [partial(hf_rnn.GRUConfig, block_layout="paper"), *ARCHITECTURES["gru"][1:]],
    "minlstm-attention": [attention_in_every_second_layer, *ARCHITECTURES["minlstm"][1:]],
    "xlstm-gated": [partial(hf_rnn.XLSTMConfig, block_layout="gated", slstm_at=[0]), *ARCHITECTURES["xlstm"][1:]],
}


def pytest_collection_finish():
    """Trainer collects garbage whenever training begins: half a second each time to look through what was imported."""
    gc.collect()
    gc.freeze()


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS(x - reference) / RMS(reference)."""
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt().clamp_min(1e-300))


def layout_of(x: torch.Tensor, mask=None, cu_seqlens=None) -> SequenceLayout:
    """Of the tokens x (B, T, ...)."""
    return SequenceLayout.of(*x.shape[:2], mask, cu_seqlens)


def for_those_that_have(*cases: tuple) -> list[tuple]:
    """Each (settings, ...) with the architectures that have these settings in front, for `parametrize`."""
    names = {name: {field.name for field in fields(classes[0])} for name, classes in ARCHITECTURES.items()}
    return [(name, *case) for case in cases for name in sorted(names) if case[0].keys() <= names[name]]


def make_head(architecture, head, **settings):
    """A small model whose every part matters."""
    (stem,) = (stem for stem in hf_rnn.ARCHITECTURES if stem.lower() == architecture)
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, initializer_range=0.3, num_labels=5)
    sizes |= dict(pad_token_id=58, bos_token_id=59, eos_token_id=60)
    model = getattr(hf_rnn, stem + head)(getattr(hf_rnn, f"{stem}Config")(**sizes | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "initial_state" in name or "bias" in name:
                parameter.normal_()
    return model.eval()


def others_slow(names, fast):
    """Names for `parametrize`, of which those that are not in `fast` are left to the slow tier."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


@pytest.fixture(params=others_slow(LAYOUTS, ARCHITECTURES))
def architecture(request) -> str:
    return request.param


@pytest.fixture
def make_model(architecture):
    """Build a small language model with weights large enough that every part of it matters."""

    def make(**config):
        config_class, model_class, _ = LAYOUTS[architecture]
        torch.manual_seed(0)
        settings = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, initializer_range=0.3)
        settings |= dict(pad_token_id=58, bos_token_id=59, eos_token_id=60)
        model = model_class(config_class(**settings | config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "initial_state" in name or "bias" in name:
                    parameter.normal_()
        return model.eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def ids():
    return torch.randint(0, 58, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def bfloat16_dot(monkeypatch):
    """Triton's interpreter (3.6 to 3.9) keeps bfloat16 as its bits, and its `tl.dot` multiplies them as integers."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def floats(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *c: dot(self, floats(a), floats(b), *c))


def pytest_runtest_teardown(item):
    """A kernel that left its memory takes the device from this process: another goes on with the other tests."""
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
