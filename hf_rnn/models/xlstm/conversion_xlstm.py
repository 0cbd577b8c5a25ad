"""xLSTM weights from and to transformers' own `xlstm` (NX-AI/xLSTM-7b) and the `xlstm` package's NeurIPS models.

Names and shapes go through transformers' conversion mechanism, shard by shard as a checkpoint is read: `hf_rnn`
registers both lists for its model_type. `from_pretrained` of a transformers checkpoint needs nothing else.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from hf_rnn.conversion import to_gate_major, to_head_major
from hf_rnn.models.xlstm.configuration_xlstm import XLSTMConfig

if TYPE_CHECKING:
    from transformers import xLSTMConfig

# transformers' settings that we have under another name
_NAMES = {"gate_soft_cap": "gate_soft_cap", "output_logit_soft_cap": "logit_soft_cap", "norm_eps": "norm_eps"}
_SAME = ["vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "use_bias", "tie_word_embeddings", "use_cache"]
_SAME += ["pad_token_id", "bos_token_id", "eos_token_id"]
# and such that change what the model computes and have no counterpart
_REQUIRED = {"add_out_norm": True, "weight_mode": "single", "eps": 1e-6}


class ConcatenateQKVO(Concatenate):
    """Rows of q, k, v and o in one matrix; unlike its parent's, the reverse knows that they are of different sizes."""

    @property
    def reverse_op(self) -> ConversionOps:
        return _SplitQKVO()


class _SplitQKVO(ConversionOps):
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):
        (tensors,) = input_dict.values()
        tensor, sizes = tensors[0] if isinstance(tensors, list) else tensors, config.sizes
        rows = [sizes[name] for name in ("qk_size", "qk_size", "v_size", "v_size")]
        return {name: part.contiguous() for name, part in zip(target_patterns, tensor.split(rows), strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return ConcatenateQKVO()


class _Elementwise(ConversionOps):
    """One tensor to one."""

    apply: Callable[[Tensor, XLSTMConfig], Tensor]

    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: self.apply(tensors[0] if isinstance(tensors, list) else tensors, config)}


class AddOne(_Elementwise):
    """The package's norms multiply by 1 + weight."""

    @staticmethod
    def apply(x: Tensor, config: XLSTMConfig) -> Tensor:
        return x + 1


class Squeeze(_Elementwise):
    """(D, 1, K) of a depthwise torch convolution to (D, K)."""

    @staticmethod
    def apply(x: Tensor, config: XLSTMConfig) -> Tensor:
        return x.squeeze(1)


class HeadMajor(_Elementwise):
    """The sLSTM's biases, gate by gate, to head by head."""

    @staticmethod
    def apply(x: Tensor, config: XLSTMConfig) -> Tensor:
        return to_head_major(x, 4, config.num_heads)


def transformers_weights() -> list[WeightRenaming | WeightConverter]:
    """From the names of transformers' `xlstm`."""
    names = {
        "backbone.embeddings": "model.embed_tokens",
        "backbone.out_norm": "model.norm",
        "backbone.blocks": "model.layers",
        "mlstm_layer.multihead_norm": "mixer.norm",  # before the next, whose target it matches on the way back
        "norm_mlstm": "mixer_norm",
        "norm_ffn": "ff_norm",
        "mlstm_layer.out_proj": "mixer.out_proj",
        "ffn.proj_down": "ff.down_proj",
    }
    qkvo = [f"mlstm_layer.{name}" for name in ("q", "k", "v", "ogate_preact")]
    return [
        *(WeightRenaming(*pair) for pair in names.items()),
        WeightConverter(qkvo, "mixer.in_proj", [ConcatenateQKVO()]),
        WeightConverter([f"mlstm_layer.{g}gate_preact" for g in "if"], "mixer.gate_proj", [Concatenate()]),
        WeightConverter(["ffn.proj_up_gate", "ffn.proj_up"], "ff.up_proj", [Concatenate()]),
    ]


def package_weights() -> list[WeightRenaming | WeightConverter]:
    """From the names of the `xlstm` package's xLSTMLMModel, with the weights of its "vanilla" backend."""
    names = {
        "token_embedding": "model.embed_tokens",
        # in full, before the next: transformers' own names end alike
        r"xlstm_block_stack.blocks.(\d+).ffn.proj_up": r"model.layers.(\d+).ff.up_proj",
        r"xlstm_block_stack.blocks.(\d+).ffn.proj_down": r"model.layers.(\d+).ff.down_proj",
        "xlstm_block_stack.blocks": "model.layers",
        ".xlstm.proj_up": ".mixer.up_proj",
        ".xlstm.proj_down": ".mixer.down_proj",
        ".xlstm.q_proj": ".mixer.q_proj",
        ".xlstm.k_proj": ".mixer.k_proj",
        ".xlstm.v_proj": ".mixer.v_proj",
        ".xlstm.learnable_skip": ".mixer.skip",
        ".xlstm.conv1d.conv.bias": ".mixer.conv.bias",
        ".xlstm.slstm_cell._recurrent_kernel_": ".mixer.recurrent_weight",
    }
    # The package's sLSTM reads its input gate from the module `fgate`, its forget gate from `igate`
    joined = {
        ".mixer.gate_proj": ([".xlstm.mlstm_cell.igate", ".xlstm.mlstm_cell.fgate"], 0),
        ".mixer.if_proj": ([".xlstm.fgate", ".xlstm.igate"], 1),
        ".mixer.zo_proj": ([".xlstm.zgate", ".xlstm.ogate"], 1),
    }
    norms = {
        ".xlstm_norm": ".mixer_norm",
        ".ffn_norm": ".ff_norm",
        ".xlstm.mlstm_cell.outnorm": ".mixer.norm",
        ".xlstm.group_norm": ".mixer.norm",
        "xlstm_block_stack.post_blocks_norm": "model.norm",
    }
    return [
        *(WeightRenaming(*pair) for pair in names.items()),
        *(WeightConverter(sources, target, [Concatenate(dim)]) for target, (sources, dim) in joined.items()),
        *(WeightConverter(source, target, [AddOne()]) for source, target in norms.items()),
        WeightConverter(".xlstm.conv1d.conv.weight", ".mixer.conv.weight", [Squeeze()]),
        WeightConverter(".xlstm.slstm_cell._bias_", ".mixer.recurrent_bias", [HeadMajor()]),
    ]


def from_transformers_config(config: dict[str, Any]) -> dict[str, Any]:
    """A transformers `xlstm` config.json as one of ours.

    Raises:
        ValueError: a setting that changes what the model computes and that ours does not have.
    """
    from transformers import xLSTMConfig  # imports the xlstm package where there is one

    full = xLSTMConfig(**{name: value for name, value in config.items() if name != "model_type"})
    for name, value in _REQUIRED.items():
        if getattr(full, name) != value:
            raise ValueError(
                f"{name}: expected {value!r} in the config of this xlstm checkpoint, got {getattr(full, name)!r}"
            )
    size = full.ffn_round_up_to_multiple_of
    return {
        "model_type": XLSTMConfig.model_type,
        "block_layout": "7b",
        **{name: getattr(full, name) for name in _SAME},
        **{ours: getattr(full, theirs) for theirs, ours in _NAMES.items()},
        "qk_size": int(full.hidden_size * full.qk_dim_factor),
        "v_size": int(full.hidden_size * full.v_dim_factor),
        "intermediate_size": int((full.hidden_size * full.ffn_proj_factor + size - 1) // size * size),
        **({"dtype": config["dtype"]} if "dtype" in config else {}),
    }


def to_transformers_config(config: XLSTMConfig) -> "xLSTMConfig":
    """The config with which transformers' `xlstm` is the same model.

    Raises:
        ValueError: a model it cannot be.
    """
    if not config.is_7b:
        raise ValueError("block_layout: transformers' xlstm has the '7b' blocks alone, got 'neurips'")
    if config.tie_word_embeddings:
        raise ValueError("tie_word_embeddings: transformers' xlstm does not tie them; untie the weights first")
    from transformers import xLSTMConfig

    sizes = config.sizes
    return xLSTMConfig(
        **{name: getattr(config, name) for name in _SAME},
        **{theirs: getattr(config, ours) for theirs, ours in _NAMES.items() if ours != "norm_eps"},
        norm_eps=config.epsilon,
        qk_dim_factor=_factor(sizes["qk_size"], config.hidden_size),
        v_dim_factor=_factor(sizes["v_size"], config.hidden_size),
        ffn_proj_factor=_factor(sizes["intermediate_size"], config.hidden_size),
        ffn_round_up_to_multiple_of=1,
        architectures=["xLSTMForCausalLM"],
    )


def _factor(size: int, width: int) -> float:
    """What times `width` is `size` or, where rounding would make it less, at most half more: it is rounded down."""
    factor = size / width
    return factor if int(factor * width) == size else (size + 0.5) / width


def from_package(state_dict: dict[str, Tensor]) -> tuple[XLSTMConfig, dict[str, Tensor]]:
    """The config of an `xlstm` package's xLSTMLMModel, read off its weights, and these as of its "vanilla" backend.

    Raises:
        ValueError: weights of something else.
    """
    if "token_embedding.weight" not in state_dict:
        raise ValueError("state_dict: expected the weights of the xlstm package's xLSTMLMModel, token_embedding.weight")
    state_dict = {name: x for name, x in state_dict.items() if not name.endswith("causal_mask")}
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, x in state_dict.items():
        if name.startswith("xlstm_block_stack.blocks."):
            number, _, rest = name.removeprefix("xlstm_block_stack.blocks.").partition(".")
            blocks.setdefault(int(number), {})[rest] = x
    slstm = [index for index, block in blocks.items() if "xlstm.slstm_cell._bias_" in block]
    vocabulary, width = state_dict["token_embedding.weight"].shape
    settings: dict[str, Any] = {"block_layout": "neurips", "num_hidden_layers": len(blocks), "slstm_at": slstm}
    settings |= {"vocab_size": vocabulary, "hidden_size": width}
    for index, block in blocks.items():
        settings["conv_kernel"] = block["xlstm.conv1d.conv.weight"].shape[-1]
        if index in slstm:
            prefix = f"xlstm_block_stack.blocks.{index}.xlstm.slstm_cell."
            R, bias = block["xlstm.slstm_cell._recurrent_kernel_"], block["xlstm.slstm_cell._bias_"]
            settings["num_heads"] = R.shape[0]
            settings["intermediate_size"] = block["ffn.proj_down.weight"].shape[1]
            if R.shape[1] < R.shape[2]:  # the "cuda" backend's (H, P, 4 * P) and biases head by head
                state_dict[f"{prefix}_recurrent_kernel_"] = R.transpose(1, 2).contiguous()
                state_dict[f"{prefix}_bias_"] = to_gate_major(bias, 4, R.shape[0])
        else:
            settings["num_heads"] = block["xlstm.mlstm_cell.igate.weight"].shape[0]
            settings["inner_size"] = block["xlstm.learnable_skip"].shape[0]
            settings["qkv_block_size"] = block["xlstm.q_proj.weight"].shape[-1]
    linear = [f"xlstm.{name}" for name in ("proj_up", "proj_down", "q_proj", "k_proj", "v_proj")]
    linear += ["ffn.proj_up", "ffn.proj_down"]
    settings["use_bias"] = any(f"{name}.bias" in block for block in blocks.values() for name in linear)
    if settings["use_bias"]:  # the package's feed-forward has none even where the mLSTM has: zeros
        for index, block in blocks.items():
            for name in linear:
                if f"{name}.weight" in block and f"{name}.bias" not in block:
                    weight = block[f"{name}.weight"]
                    zeros = weight.new_zeros(weight.shape[:-1].numel())
                    state_dict[f"xlstm_block_stack.blocks.{index}.{name}.bias"] = zeros
    head, embedding = state_dict.get("lm_head.weight"), state_dict["token_embedding.weight"]
    settings["tie_word_embeddings"] = head is None or torch.equal(head, embedding)
    settings |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return XLSTMConfig(**settings), state_dict
