"""xLSTM weights from and to transformers' own `xlstm` (NX-AI/xLSTM-7b) and the `xlstm` package's NeurIPS models.

The former go through transformers' conversion mechanism, shard by shard as a checkpoint is read: `transformers_weights`
is registered for our model_type, and `from_pretrained` needs nothing else. The latter are a state dict in memory.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from hf_rnn.exchange.gate_order import to_head_major
from hf_rnn.models.xlstm.configuration_xlstm import XLSTMConfig


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


def check_complete(info: dict[str, Any], name: str) -> None:
    """Raise ValueError unless `from_pretrained` found every weight, and no other."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise ValueError(f"{name}: {what.replace('_', ' ')}, such as {sorted(map(str, info[what]))[0]}")


# What the package's modules in a block are called here
_MODULES = {
    "xlstm.proj_up": "mixer.up_proj",
    "xlstm.proj_down": "mixer.down_proj",
    "xlstm.q_proj": "mixer.q_proj",
    "xlstm.k_proj": "mixer.k_proj",
    "xlstm.v_proj": "mixer.v_proj",
    "ffn.proj_up": "ff.up_proj",
    "ffn.proj_down": "ff.down_proj",
}
_NORMS = {
    "xlstm_norm": "mixer_norm",
    "ffn_norm": "ff_norm",
    "xlstm.mlstm_cell.outnorm": "mixer.norm",
    "xlstm.group_norm": "mixer.norm",
}


def from_package(state_dict: dict[str, Tensor]) -> tuple[XLSTMConfig, dict[str, Tensor]]:
    """The config of an `xlstm` package's xLSTMLMModel, read off its weights, and these under our names.

    Raises:
        ValueError: weights of something else, or of a model that ours cannot be.
    """
    rest = {name: x for name, x in state_dict.items() if not name.endswith("causal_mask")}
    blocks: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in rest if name.startswith("xlstm_block_stack.blocks.")]:
        number, _, own_name = name.removeprefix("xlstm_block_stack.blocks.").partition(".")
        blocks.setdefault(int(number), {})[own_name] = rest.pop(name)
    try:
        embedding, norm = rest.pop("token_embedding.weight"), rest.pop("xlstm_block_stack.post_blocks_norm.weight")
    except KeyError as error:
        raise ValueError(f"state_dict: expected the weights of an xLSTMLMModel, {error} among them") from error
    head = rest.pop("lm_head.weight", embedding)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm + 1, "lm_head.weight": head}
    slstm = sorted(index for index, block in blocks.items() if "xlstm.slstm_cell._bias_" in block)
    biases = any(name.endswith("proj_up.bias") for block in blocks.values() for name in block)
    settings: dict[str, Any] = {"block_layout": "neurips", "slstm_at": slstm, "use_bias": biases}
    settings |= {"vocab_size": embedding.shape[0], "hidden_size": embedding.shape[1], "num_hidden_layers": len(blocks)}
    settings |= {"tie_word_embeddings": torch.equal(head, embedding)}
    settings |= dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    for index, block in blocks.items():
        try:
            sizes, own = _block(block, biases)
        except KeyError as error:
            raise ValueError(f"state_dict: expected {error} in block {index}; ours cannot do without") from error
        rest |= {f"{index}.{name}": x for name, x in block.items()}
        weights |= {f"model.layers.{index}.{name}": x for name, x in own.items()}
        for name, size in sizes.items():
            if settings.setdefault(name, size) != size:
                raise ValueError(f"state_dict: expected one {name} for all blocks, got {settings[name]} and {size}")
    if rest:
        raise ValueError(f"state_dict: no place for {next(iter(rest))}")
    return XLSTMConfig(**settings), weights


def _block(block: dict[str, Tensor], biases: bool) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Sizes and weights of a block, which are taken out of `block`."""
    convolution = block.pop("xlstm.conv1d.conv.weight")
    weights = {"mixer.conv.weight": convolution.squeeze(1), "mixer.conv.bias": block.pop("xlstm.conv1d.conv.bias")}
    sizes = {"conv_kernel": convolution.shape[-1]}
    for theirs, ours in _NORMS.items():
        if f"{theirs}.weight" in block:
            weights[f"{ours}.weight"] = block.pop(f"{theirs}.weight") + 1  # theirs multiply by 1 + weight
    if "xlstm.slstm_cell._bias_" in block:
        R, bias = block.pop("xlstm.slstm_cell._recurrent_kernel_"), block.pop("xlstm.slstm_cell._bias_")
        sizes |= {"num_heads": R.shape[0], "intermediate_size": block["ffn.proj_down.weight"].shape[1]}
        if R.shape[1] < R.shape[2]:  # its "cuda" backend's (H, P, 4 * P), with biases head by head
            R = R.transpose(1, 2)
        else:
            bias = to_head_major(bias, 4, R.shape[0])
        weights |= {"mixer.recurrent_weight": R, "mixer.recurrent_bias": bias}
        # Its sLSTM reads the input gate from the module `fgate`, the forget gate from `igate`
        for name, sources in (("if_proj", ("fgate", "igate")), ("zo_proj", ("zgate", "ogate"))):
            weights[f"mixer.{name}.weight"] = torch.cat([block.pop(f"xlstm.{gate}.weight") for gate in sources], 1)
    else:
        for kind in ("weight", "bias"):
            gates = [block.pop(f"xlstm.mlstm_cell.{gate}gate.{kind}") for gate in "if"]
            weights[f"mixer.gate_proj.{kind}"] = torch.cat(gates)
        weights["mixer.skip"] = block.pop("xlstm.learnable_skip")
        sizes |= {"num_heads": gates[0].shape[0], "inner_size": weights["mixer.skip"].shape[0]}
        sizes["qkv_block_size"] = block["xlstm.q_proj.weight"].shape[-1]
    for theirs, ours in _MODULES.items():
        if f"{theirs}.weight" in block:
            weight = weights[f"{ours}.weight"] = block.pop(f"{theirs}.weight")
            if biases:  # where its mLSTM has them, its feed-forward may have none
                zeros = weight.new_zeros(weight.shape[:-1].numel())
                weights[f"{ours}.bias"] = block.pop(f"{theirs}.bias", zeros)
    return sizes, weights
