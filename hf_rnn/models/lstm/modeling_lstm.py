"""LSTM, dense as in torch.nn or with heads: what the other architectures are compared with."""

import torch
from torch import Tensor, nn

from hf_rnn.exchange.torch_nn import TorchExchangeModel
from hf_rnn.layers import MultiHeadMixer
from hf_rnn.models.lstm.configuration_lstm import LSTMConfig
from hf_rnn.models.lstm.projected import projected_lstm
from hf_rnn.skeleton.heads import (
    RecurrentForCTC,
    RecurrentForMaskedLM,
    RecurrentForPrediction,
    RecurrentForQuestionAnswering,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM
from hf_rnn_kernels import lstm_scan
from hf_rnn_kernels.fused_step.program import NotFusable, Op, Program, Vector
from hf_rnn_kernels.layout import SequenceLayout


class LSTM(MultiHeadMixer):
    """i, f, g, o = W x_t + R h_{t-1} + b; c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g); h_t = sigmoid(o) tanh(c_t).

    With `config.projection_size` h_t is a linear layer of that.
    """

    num_projections = 4  # i, f, g, o
    num_states = 2  # h, c

    def __init__(self, config: LSTMConfig, input_size: int | None = None):
        super().__init__(config, input_size)
        if config.projection_size is not None:
            size, inner = config.projection_size, config.inner_size
            self.projection = nn.Linear(inner, size, bias=False)
            self.recurrent_weight = nn.Parameter(torch.empty(1, 4 * inner, size))
            self.state_shapes[0] = (size,)

    def initial_bias(self) -> Tensor:
        one_head = torch.tensor([0.0, self.config.forget_bias, 0.0, 0.0])
        size = self.config.inner_size // self.config.num_heads
        return one_head.repeat_interleave(size).repeat(self.config.num_heads)

    def recurrence(
        self, x: Tensor, state: tuple[Tensor | None, ...], layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        h0, c0 = state
        if self.projection is not None:
            biases = [] if self.recurrent_bias is None else [self.in_proj.bias, self.recurrent_bias]
            weights = [self.in_proj.weight, self.recurrent_weight[0], *biases, self.projection.weight]
            return projected_lstm(x, weights, h0, c0, layout)
        return lstm_scan(**self.operands(x), h0=h0, c0=c0, layout=layout)

    def fuse_recurrence(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        if self.projection is not None:
            raise NotFusable("an LSTM with a projected state, which has no instructions")
        return self.fuse_cell(Op.LSTM, program, x, states)


class LSTMModel(TorchExchangeModel):
    """LSTM without a head."""

    config_class = LSTMConfig
    mixer_class = LSTM
    torch_class = nn.LSTM


class LSTMForCausalLM(RecurrentForCausalLM):
    """LSTM language model."""

    config_class = LSTMConfig
    model_class = LSTMModel


class LSTMForMaskedLM(RecurrentForMaskedLM):
    """LSTM that fills in masked tokens."""

    config_class = LSTMConfig
    model_class = LSTMModel


class LSTMForTokenClassification(RecurrentForTokenClassification):
    """LSTM with a label for each token."""

    config_class = LSTMConfig
    model_class = LSTMModel


class LSTMForSequenceClassification(RecurrentForSequenceClassification):
    """LSTM with a classifier of sequences."""

    config_class = LSTMConfig
    model_class = LSTMModel


class LSTMForQuestionAnswering(RecurrentForQuestionAnswering):
    """LSTM that marks the answer in a text."""

    config_class = LSTMConfig
    model_class = LSTMModel


class LSTMForCTC(RecurrentForCTC):
    """LSTM that transcribes."""

    config_class = LSTMConfig
    model_class = LSTMModel


class LSTMForPrediction(RecurrentForPrediction):
    """LSTM that forecasts series."""

    config_class = LSTMConfig
    model_class = LSTMModel
