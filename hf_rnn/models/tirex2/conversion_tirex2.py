"""TiRex-2 weights from and to the `tirex-2` package (NX-AI/TiRex-2), shard by shard as a checkpoint is read.

There both directions of a block are one module with two names, and so are an sLSTM's recurrent weights; a file holds
each tensor once, under any of its names.
"""

from abc import abstractmethod

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from hf_rnn.models.xlstm.conversion_xlstm import ConcatenateQKVO


class _OneTensor(ConversionOps):
    """A tensor as another one."""

    @abstractmethod
    def turn(self, x: Tensor, config) -> Tensor:
        """The tensor as the other side has it."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs):
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: self.turn(tensor, config).contiguous()}


class _RecurrentWeight(_OneTensor):
    """(H, inputs, gates, units) to (H, gates * units, inputs)."""

    def turn(self, x, config):
        return x.permute(0, 2, 3, 1).flatten(1, 2)

    @property
    def reverse_op(self) -> ConversionOps:
        return _RecurrentKernel()


class _RecurrentKernel(_OneTensor):
    def turn(self, x, config):
        return x.unflatten(1, (4, -1)).permute(0, 3, 1, 2)

    @property
    def reverse_op(self) -> ConversionOps:
        return _RecurrentWeight()


class _Flat(_OneTensor):
    """(H, gates, units) to a vector."""

    def turn(self, x, config):
        return x.flatten()

    @property
    def reverse_op(self) -> ConversionOps:
        return _OfHeads()


class _OfHeads(_OneTensor):
    def turn(self, x, config):
        return x.view(config.slstm_heads, 4, -1)

    @property
    def reverse_op(self) -> ConversionOps:
        return _Flat()


def tirex_weights() -> list[WeightRenaming | WeightConverter]:
    """From the names that `tirex-2` has, one of each tensor. Read backwards, each name's target is not yet another's
    part when its turn comes."""
    names = {
        r"^stack\.": "model.layers.",
        "input_patch_embedding": "model.patch_embedding",
        "output_patch_embedding": "quantile_head",
        "hidden_layer": "hidden_proj",
        "output_layer": "output_proj",
        "residual_layer": "skip_proj",
        "stack_out_norm": "model.norm",
        "variate_mixer.norm_attn": "variates.attention_norm",
        "variate_mixer.norm_ffn": "variates.mlp_norm",
        "variate_mixer.ffn.wi": "variates.mlp_up",
        "variate_mixer.ffn.wo": "variates.mlp_down",
        "variate_mixer.attn.WO": "variates.attention.out_proj",
        "time_mixer.norm_lstm": "mixer_norm",
        "time_mixer.norm_ffn": "ff_norm",
        "time_mixer.combination": "directions_proj",
        "time_mixer.ffn.proj_down": "ff.down_proj",
        "time_mixer.fwd_cell.multihead_norm": "mlstm.norm",
        "time_mixer.fwd_cell.out_proj": "mlstm.out_proj",
        "time_mixer.fwd_cell.group_norm": "slstm.norm",
    }
    cell = "time_mixer.fwd_cell"
    return [
        *(WeightRenaming(*pair) for pair in names.items()),
        WeightConverter([f"{cell}.{n}" for n in ("q", "k", "v", "ogate_preact")], "mlstm.in_proj", [ConcatenateQKVO()]),
        WeightConverter([f"{cell}.{g}gate_preact" for g in "if"], "mlstm.gate_proj", [Concatenate()]),
        # Its sLSTM reads the input gate from the module `fgate`, the forget gate from `igate`
        WeightConverter([f"{cell}.{g}gate" for g in "fizo"], "slstm.ifzo_proj", [Concatenate(dim=1)]),
        WeightConverter(f"{cell}._recurrent_kernel_", "slstm.recurrent_weight", [_RecurrentWeight()]),
        WeightConverter(f"{cell}._bias_", "slstm.recurrent_bias", [_Flat()]),
        WeightConverter(["time_mixer.ffn.proj_up_gate", "time_mixer.ffn.proj_up"], "ff.up_proj", [Concatenate()]),
        WeightConverter([f"variate_mixer.attn.W{n}" for n in "QKV"], "variates.attention.in_proj", [Concatenate()]),
    ]


def other_names() -> list[WeightRenaming]:
    """From the other names that a tensor may be stored under."""
    cell = "time_mixer.fwd_cell"
    return [
        WeightRenaming("time_mixer.rev_cell", cell),
        WeightRenaming(f"{cell}.recurrent_kernel", f"{cell}._recurrent_kernel_"),
        WeightRenaming(f"{cell}.bias", f"{cell}._bias_"),
    ]
