"""The language models that are compared, every one at the same number of parameters.

Ours in blocks of every layout, four of them; Mamba and a Transformer (Llama's block) by transformers, Mamba with
mambapy's parallel scan where no CUDA kernel is there: its own loop over time takes ten times as long at 128 tokens.
What is searched for is the width.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

import torch
from driver import sized
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

import hf_rnn

LAYERS = sized(cpu=4, gpu=4, dry=1)
HYBRID = ["linear_attention", "linear_attention", "sliding_attention", "linear_attention"][-LAYERS:]  # one in four


def _ours(name: str, **settings) -> Callable[..., PreTrainedModel]:
    def build(width: int, **common) -> PreTrainedModel:
        config = getattr(hf_rnn, f"{name}Config")(hidden_size=width, num_hidden_layers=LAYERS, **settings, **common)
        return getattr(hf_rnn, f"{name}ForCausalLM")(config)

    return build


def _twice_as_wide(**settings) -> Callable[..., PreTrainedModel]:
    """An xLSTM whose cells have 2 * width channels, not rounded up to a multiple of 64 as by default."""
    return lambda width, **common: _ours("XLSTM", num_heads=4, inner_size=2 * width, **settings)(width, **common)


def _mamba(width: int, **common) -> PreTrainedModel:
    config = MambaConfig(hidden_size=width, num_hidden_layers=LAYERS, use_mambapy=True, **common)
    return MambaForCausalLM(config)


def _transformer(width: int, **common) -> PreTrainedModel:
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=8 * width // 3,
        max_position_embeddings=2**17,
        **common,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "LSTM": _ours("LSTM"),
    "GRU": _ours("GRU"),
    "minGRU": _ours("MinGRU"),
    "minLSTM": _ours("MinLSTM"),
    "xLSTM": _ours("XLSTM", num_heads=4),
    "Mamba (transformers)": _mamba,
    "Transformer (transformers)": _transformer,
}

# And blocks of other layouts than the default ones
LAYOUTS = MODELS | {
    **{
        f"{name}, paper": _ours(name.replace("min", "Min"), block_layout="paper")
        for name in ("LSTM", "GRU", "minGRU", "minLSTM")
    },
    "xLSTM, neurips": _twice_as_wide(block_layout="neurips"),
    "sLSTM": _twice_as_wide(block_layout="gated", slstm_at="all"),
    "minGRU and attention": _ours("MinGRU", layer_types=HYBRID),
}


@cache
def width(name: str, parameters: int, vocab_size: int) -> int:
    """The width that comes closest to so many parameters."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return LAYOUTS[name](width, **_tokens(vocab_size)).num_parameters()

    # Four heads, of even widths
    step = 8 if name in ("xLSTM", "Transformer (transformers)", "minGRU and attention") else 2
    low, high = 2, 1024
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(step * middle) <= parameters else (low, middle)
    return step * min((low, high), key=lambda n: abs(count(step * n) - parameters))


def nearest_width(build: Callable[[int], PreTrainedModel], parameters: int, widths: Sequence[int]) -> int:
    """The one, of rising ones, whose model comes closest to so many parameters."""

    def count(width: int) -> int:
        with torch.device("meta"):
            return build(width).num_parameters()

    above = bisect_left(widths, parameters, 1, len(widths) - 1, key=count)
    return min(widths[above - 1 : above + 1], key=lambda width: abs(count(width) - parameters))


def make(name: str, parameters: int, vocab_size: int) -> PreTrainedModel:
    """A model of `LAYOUTS` with random weights."""
    return LAYOUTS[name](width(name, parameters, vocab_size), **_tokens(vocab_size))


def _tokens(vocab_size: int) -> dict:
    return dict(vocab_size=vocab_size, pad_token_id=None, bos_token_id=None, eos_token_id=None)
