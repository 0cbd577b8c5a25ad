"""GRU, dense as in torch.nn or with heads: what the other architectures are compared with."""

import torch
from torch import Tensor, nn

from hf_rnn.exchange.torch_nn import TorchExchangeModel
from hf_rnn.layers import MultiHeadMixer
from hf_rnn.models.gru.configuration_gru import GRUConfig
from hf_rnn.skeleton.heads import (
    RecurrentForCTC,
    RecurrentForMaskedLM,
    RecurrentForPrediction,
    RecurrentForQuestionAnswering,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM
from hf_rnn_kernels import gru_scan
from hf_rnn_kernels.fused_step.program import Op, Program, Vector
from hf_rnn_kernels.layout import SequenceLayout


class GRU(MultiHeadMixer):
    """r, z = sigmoid(W x_t + R h_{t-1} + b); n = tanh(W x_t + b + r (R h_{t-1} + b')); h_t = (1 - z) n + z h_{t-1}."""

    num_projections = 3  # r, z, n

    def initial_bias(self) -> Tensor:
        one_head = torch.tensor([0.0, self.config.forget_bias, 0.0])
        return one_head.repeat_interleave(self.recurrent_weight.shape[2]).repeat(self.config.num_heads)

    def recurrence(
        self, x: Tensor, state: tuple[Tensor | None, ...], layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        h, last = gru_scan(**self.operands(x), h0=state[0], layout=layout)
        return h, (last,)

    def fuse_recurrence(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        return self.fuse_cell(Op.GRU, program, x, states)


class GRUModel(TorchExchangeModel):
    """GRU without a head."""

    config_class = GRUConfig
    mixer_class = GRU
    torch_class = nn.GRU


class GRUForCausalLM(RecurrentForCausalLM):
    """GRU language model."""

    config_class = GRUConfig
    model_class = GRUModel


class GRUForMaskedLM(RecurrentForMaskedLM):
    """GRU that fills in masked tokens."""

    config_class = GRUConfig
    model_class = GRUModel


class GRUForTokenClassification(RecurrentForTokenClassification):
    """GRU with a label for each token."""

    config_class = GRUConfig
    model_class = GRUModel


class GRUForSequenceClassification(RecurrentForSequenceClassification):
    """GRU with a classifier of sequences."""

    config_class = GRUConfig
    model_class = GRUModel


class GRUForQuestionAnswering(RecurrentForQuestionAnswering):
    """GRU that marks the answer in a text."""

    config_class = GRUConfig
    model_class = GRUModel


class GRUForCTC(RecurrentForCTC):
    """GRU that transcribes."""

    config_class = GRUConfig
    model_class = GRUModel


class GRUForPrediction(RecurrentForPrediction):
    """GRU that forecasts series."""

    config_class = GRUConfig
    model_class = GRUModel
