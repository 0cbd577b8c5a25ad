"""minLSTM: an LSTM whose gates see only the input, so that training is a scan (arXiv 2410.01201)."""

import torch
from torch import Tensor

from hf_rnn.layers import RecurrentMixer
from hf_rnn.models.minlstm.configuration_minlstm import MinLSTMConfig
from hf_rnn.skeleton.heads import (
    RecurrentForCTC,
    RecurrentForMaskedLM,
    RecurrentForPrediction,
    RecurrentForQuestionAnswering,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM, RecurrentModel
from hf_rnn_kernels import min_lstm_scan
from hf_rnn_kernels.fused_step.program import Op, Program, Vector
from hf_rnn_kernels.layout import SequenceLayout


class MinLSTM(RecurrentMixer):
    """f_t = sigmoid(W_f x_t), i_t = sigmoid(W_i x_t), h~_t = g(W_h x_t), h_t = f'_t h_{t-1} + i'_t h~_t.

    f' = f / (f + i) and i' = i / (f + i) (paper, sections 3.2 and B.3).
    """

    num_projections = 3  # f, i, h~

    def initial_bias(self) -> Tensor:
        return torch.tensor([self.config.forget_bias, 0.0, 0.0]).repeat_interleave(self.config.inner_size)

    def recurrence(
        self, x: Tensor, state: tuple[Tensor | None, ...], layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        forget, input_, candidate = self.in_proj(x).chunk(3, -1)
        options = dict(use_g=self.config.use_g, normalize=self.config.normalize_gates)
        h, last = min_lstm_scan(forget, input_, candidate, state[0], layout, **options)
        return h, (last,)

    def fuse_recurrence(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        gates, options = program.linear(self.in_proj, x).chunk(3), (self.config.use_g, self.config.normalize_gates)
        return program.gated(Op.MIN_LSTM, gates, states[0], *options)


class MinLSTMModel(RecurrentModel):
    """minLSTM without a head."""

    config_class = MinLSTMConfig
    mixer_class = MinLSTM


class MinLSTMForCausalLM(RecurrentForCausalLM):
    """minLSTM language model."""

    config_class = MinLSTMConfig
    model_class = MinLSTMModel


class MinLSTMForMaskedLM(RecurrentForMaskedLM):
    """minLSTM that fills in masked tokens."""

    config_class = MinLSTMConfig
    model_class = MinLSTMModel


class MinLSTMForTokenClassification(RecurrentForTokenClassification):
    """minLSTM with a label for each token."""

    config_class = MinLSTMConfig
    model_class = MinLSTMModel


class MinLSTMForSequenceClassification(RecurrentForSequenceClassification):
    """minLSTM with a classifier of sequences."""

    config_class = MinLSTMConfig
    model_class = MinLSTMModel


class MinLSTMForQuestionAnswering(RecurrentForQuestionAnswering):
    """minLSTM that marks the answer in a text."""

    config_class = MinLSTMConfig
    model_class = MinLSTMModel


class MinLSTMForCTC(RecurrentForCTC):
    """minLSTM that transcribes."""

    config_class = MinLSTMConfig
    model_class = MinLSTMModel


class MinLSTMForPrediction(RecurrentForPrediction):
    """minLSTM that forecasts series."""

    config_class = MinLSTMConfig
    model_class = MinLSTMModel
