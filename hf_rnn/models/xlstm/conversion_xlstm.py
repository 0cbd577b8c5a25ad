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
_SAME = ["vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "tie_word_embeddings", "use_cache"]
_SAME += ["pad_token_id", "bos_token_id", "eos_token_id"]
# and such that change what the model computes and have no counterpart
_REQUIRED = {"add_out_norm": True, "weight_mode": "single", "eps": 1e-6, "use_bias": False}
_SIZES = ["qk_dim_factor", "v_dim_factor", "ffn_proj_factor", "ffn_round_up_to_multiple_of"]


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
    """One tensor to one, in this direction alone."""

    apply: Callable[[Tensor, XLSTMConfig], Tensor]

    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: self.apply(tensors[0] if isinstance(tensors, list) else tensors, config)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("save_original_format: use `hf-rnn convert` to write transformers' names")


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

    config = dict(config)
    for name, other in (
        ("hidden_size", "embedding_dim"),
        ("num_hidden_layers", "num_blocks"),
        ("dtype", "torch_dtype"),
    ):
        if config.get(name) is None and config.get(other) is not None:
            config[name] = config[other]
    # only what is read: other settings, such as kernels, are valid or not by what is installed
    read = [*_SAME, *_NAMES, *_REQUIRED, *_SIZES]
    full = xLSTMConfig(**{name: config[name] for name in read if name in config})
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
    if config.use_bias:
        raise ValueError("use_bias: in transformers' xlstm the norms then have biases, too, which ours have not")
    if config.gate_soft_cap is None or config.logit_soft_cap is None:
        raise ValueError("gate_soft_cap, logit_soft_cap: transformers' xlstm has both, got None")
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


def check_complete(info: dict[str, Any], name: str) -> None:
    """Raise ValueError unless `from_pretrained` found every weight, and no other."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(f"{name}: {what.replace('_', ' ')}, such as {sorted(map(str, info[what]))[0]}")


def _factor(size: int, width: int) -> float:
    """What times `width` is `size` or, where rounding would make it less, at most half more: it is rounded down."""
    factor = size / width
    return factor if int(factor * width) == size else (size + 0.5) / width


def from_package(state_dict: dict[str, Tensor]) -> tuple[XLSTMConfig, dict[str, Tensor]]:
    """The config of an `xlstm` package's xLSTMLMModel, read off its weights, and these as of its "vanilla" backend.

    Raises:
        ValueError: weights of something else, or of a model that ours cannot be.
    """
    for name in ("token_embedding.weight", "xlstm_block_stack.post_blocks_norm.weight"):
        if name not in state_dict:
            raise ValueError(f"state_dict: expected the weights of the xlstm package's xLSTMLMModel, {name} among them")
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
        try:
            own = _slstm_settings(block) if index in slstm else _mlstm_settings(block)
        except KeyError as error:
            raise ValueError(f"state_dict: expected {error} in block {index}; ours cannot do without") from error
        for name, value in own.items():
            if settings.setdefault(name, value) != value:
                raise ValueError(f"state_dict: expected one {name} for all blocks, got {settings[name]} and {value}")
        if index in slstm:
            prefix = f"xlstm_block_stack.blocks.{index}.xlstm.slstm_cell."
            R, bias = block["xlstm.slstm_cell._recurrent_kernel_"], block["xlstm.slstm_cell._bias_"]
            if R.shape[1] < R.shape[2]:  # the "cuda" backend's (H, P, 4 * P) and biases head by head
                state_dict[f"{prefix}_recurrent_kernel_"] = R.transpose(1, 2).contiguous()
                state_dict[f"{prefix}_bias_"] = to_gate_major(bias, 4, R.shape[0])
    settings["use_bias"] = _fill_biases(state_dict, blocks)
    head, embedding = state_dict.get("lm_head.weight"), state_dict["token_embedding.weight"]
    settings["tie_word_embeddings"] = head is None or torch.equal(head, embedding)
    settings |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return XLSTMConfig(**settings), state_dict


def _slstm_settings(block: dict[str, Tensor]) -> dict[str, int]:
    return {
        "num_heads": block["xlstm.slstm_cell._recurrent_kernel_"].shape[0],
        "conv_kernel": block["xlstm.conv1d.conv.weight"].shape[-1],
        "intermediate_size": block["ffn.proj_down.weight"].shape[1],
    }


def _mlstm_settings(block: dict[str, Tensor]) -> dict[str, int]:
    return {
        "num_heads": block["xlstm.mlstm_cell.igate.weight"].shape[0],
        "conv_kernel": block["xlstm.conv1d.conv.weight"].shape[-1],
        "inner_size": block["xlstm.learnable_skip"].shape[0],
        "qkv_block_size": block["xlstm.q_proj.weight"].shape[-1],
    }


def _fill_biases(state_dict: dict[str, Tensor], blocks: dict[int, dict[str, Tensor]]) -> bool:
    """Whether there are biases; then zeros where the package has none: its feed-forward beside an mLSTM with them."""
    linear = [f"xlstm.{name}" for name in ("proj_up", "proj_down", "q_proj", "k_proj", "v_proj")]
    linear += ["ffn.proj_up", "ffn.proj_down"]
    found = any(f"{name}.bias" in block for block in blocks.values() for name in linear)
    for index, block in blocks.items() if found else ():
        for name in linear:
            if f"{name}.weight" in block and f"{name}.bias" not in block:
                weight = block[f"{name}.weight"]
                state_dict[f"xlstm_block_stack.blocks.{index}.{name}.bias"] = weight.new_zeros(
                    weight.shape[:-1].numel()
                )
    return found
