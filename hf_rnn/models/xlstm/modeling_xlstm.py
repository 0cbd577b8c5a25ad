"""xLSTM: exponential gates, in an LSTM with a matrix as memory (mLSTM) and in one that sees its state (sLSTM)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from hf_rnn.layers import CausalConv, GatedFeedForward, Mixer, RMSNorm
from hf_rnn.models.xlstm.configuration_xlstm import XLSTMConfig
from hf_rnn.models.xlstm.conversion_xlstm import check_complete, from_package, transformers_weights
from hf_rnn.models.xlstm.mlstm import MLSTM, UpProjectedMLSTM
from hf_rnn.models.xlstm.slstm import SLSTM
from hf_rnn.skeleton.modeling_recurrent import (
    RecurrentBlock,
    RecurrentForCausalLM,
    RecurrentForSequenceClassification,
    RecurrentModel,
    RecurrentPreTrainedModel,
)

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


class XLSTMModel(XLSTMPreTrainedModel, RecurrentModel):
    """xLSTM without a head."""

    def make_norm(self, config: XLSTMConfig) -> nn.Module:
        if config.is_7b:
            return RMSNorm(config.hidden_size, eps=config.epsilon)
        return nn.LayerNorm(config.hidden_size, eps=config.epsilon, bias=False)

    def make_block(self, config: XLSTMConfig, layer_idx: int) -> RecurrentBlock:
        mixer: Mixer
        activation: Callable[[Tensor], Tensor] | None
        if layer_idx in config.slstm_blocks:
            mixer, activation = SLSTM(config, layer_idx), nn.functional.gelu
        elif config.is_7b:
            mixer, activation = MLSTM(config), nn.functional.silu
        else:
            mixer, activation = UpProjectedMLSTM(config), None
        norm, ff_norm, ff = self.make_norm(config), None, None
        if activation is not None:
            size = config.sizes["intermediate_size"]
            ff_norm, ff = (
                self.make_norm(config),
                GatedFeedForward(config.hidden_size, size, activation, config.use_bias),
            )
        return RecurrentBlock(layer_idx, mixer, norm, None, ff_norm, ff, config.hidden_dropout)


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


class XLSTMForSequenceClassification(XLSTMPreTrainedModel, RecurrentForSequenceClassification):
    """xLSTM with a classifier on the last real token."""

    model_class = XLSTMModel
