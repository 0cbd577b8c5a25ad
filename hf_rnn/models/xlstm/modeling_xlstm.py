"""xLSTM: exponential gates, in an LSTM with a matrix as memory (mLSTM) and in one that sees its state (sLSTM)."""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from hf_rnn.layers import CausalConv, GatedFeedForward, Mixer, RMSNorm, SlidingAttention
from hf_rnn.models.xlstm.configuration_xlstm import XLSTMConfig
from hf_rnn.models.xlstm.conversion_xlstm import check_complete, from_package, transformers_weights
from hf_rnn.models.xlstm.mlstm import MLSTM, UpProjectedMLSTM
from hf_rnn.models.xlstm.slstm import SLSTM, GatedSLSTM
from hf_rnn.skeleton.block import RecurrentBlock
from hf_rnn.skeleton.heads import (
    RecurrentForCTC,
    RecurrentForMaskedLM,
    RecurrentForPrediction,
    RecurrentForQuestionAnswering,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM, RecurrentModel
from hf_rnn.skeleton.pretrained import RecurrentPreTrainedModel
from hf_rnn_kernels.fused_step.program import Op, Program, Vector

register_checkpoint_conversion_mapping(XLSTMConfig.model_type, transformers_weights())


class XLSTMPreTrainedModel(RecurrentPreTrainedModel):
    """The papers' initialisation."""

    config_class = XLSTMConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initial_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, CausalConv):  # torch's convolutions
            init.uniform_(module.weight, -(module.kernel_size**-0.5), module.kernel_size**-0.5)
            init.uniform_(module.bias, -(module.kernel_size**-0.5), module.kernel_size**-0.5)
        else:
            super()._init_weights(module)
        if isinstance(module, GatedFeedForward):
            init.normal_(module.down_proj.weight, std=self.config.initial_output_std)
        elif isinstance(module, SlidingAttention):
            init.normal_(module.o_proj.weight, std=self.config.initial_output_std)


class XLSTMModel(XLSTMPreTrainedModel, RecurrentModel):
    """xLSTM without a head."""

    def make_norm(self, config: XLSTMConfig) -> nn.Module:
        if config.is_7b:
            return RMSNorm(config.hidden_size, eps=config.epsilon)
        return nn.LayerNorm(config.hidden_size, eps=config.epsilon, bias=False)

    def make_block(self, config: XLSTMConfig, layer_idx: int) -> RecurrentBlock:
        mixer = self.directions(lambda: self.make_mixer(config, layer_idx))
        ff_norm, ff = None, None
        one_direction = mixer.forwards if config.bidirectional else mixer
        if not isinstance(one_direction, UpProjectedMLSTM | GatedSLSTM):
            activation = nn.functional.silu if config.is_7b else nn.functional.gelu
            ff_norm, size = self.make_norm(config), config.sizes["intermediate_size"]
            ff = GatedFeedForward(config.hidden_size, size, activation, config.use_bias)
        return RecurrentBlock(layer_idx, mixer, self.make_norm(config), None, ff_norm, ff, config.hidden_dropout)

    def make_mixer(self, config: XLSTMConfig, layer_idx: int) -> Mixer:
        if config.is_attention(layer_idx):
            return SlidingAttention(config)
        if layer_idx in config.slstm_blocks:
            return GatedSLSTM(config, layer_idx) if config.block_layout == "gated" else SLSTM(config, layer_idx)
        return MLSTM(config) if config.is_7b else UpProjectedMLSTM(config)


class XLSTMForCausalLM(XLSTMPreTrainedModel, RecurrentForCausalLM):
    """xLSTM language model."""

    model_class = XLSTMModel

    @classmethod
    def from_xlstm(cls, state_dict: dict[str, Tensor]) -> "XLSTMForCausalLM":
        """The same model as the `xlstm` package's `xLSTMLMModel` with these weights, its config read off them.

        Of the package's options only the paper's: norms with weights, a norm after the blocks, one number of heads and
        one width of convolutions. Weights do not show that its feed-forward is a gated GELU: taken for granted.

        Raises:
            ValueError: weights of another model, or of one with other options.
        """
        config, state_dict = from_package(state_dict)
        dtype = state_dict["lm_head.weight"].dtype
        model, info = cls.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
        )
        check_complete(info, "state_dict")
        return model

    def logits(self, x: Tensor) -> Tensor:
        logits, cap = self.lm_head(x), self.config.logit_soft_cap
        if not self.config.is_7b or cap is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cap * torch.tanh(logits / cap)

    def fuse_logits(self, program: Program, x: Vector) -> None:
        super().fuse_logits(program, x)
        if self.config.is_7b and self.config.logit_soft_cap is not None:
            program.pointwise(Op.SOFT_CAP, program.logits, out=program.logits, cap=self.config.logit_soft_cap)


class XLSTMForMaskedLM(XLSTMPreTrainedModel, RecurrentForMaskedLM):
    """xLSTM that fills in masked tokens."""

    model_class = XLSTMModel
    logits = XLSTMForCausalLM.logits


class XLSTMForTokenClassification(XLSTMPreTrainedModel, RecurrentForTokenClassification):
    """xLSTM with a label for each token."""

    model_class = XLSTMModel


class XLSTMForSequenceClassification(XLSTMPreTrainedModel, RecurrentForSequenceClassification):
    """xLSTM with a classifier of sequences."""

    model_class = XLSTMModel


class XLSTMForQuestionAnswering(XLSTMPreTrainedModel, RecurrentForQuestionAnswering):
    """xLSTM that marks the answer in a text."""

    model_class = XLSTMModel


class XLSTMForCTC(XLSTMPreTrainedModel, RecurrentForCTC):
    """xLSTM that transcribes."""

    model_class = XLSTMModel


class XLSTMForPrediction(XLSTMPreTrainedModel, RecurrentForPrediction):
    """xLSTM that forecasts series."""

    model_class = XLSTMModel
