"""minGRU: a GRU whose gates see only the input, so that training is a scan (arXiv 2410.01201)."""

import torch
from torch import Tensor

from hf_rnn.layers import RecurrentMixer
from hf_rnn.models.mingru.configuration_mingru import MinGRUConfig
from hf_rnn.skeleton.heads import (
    RecurrentForCTC,
    RecurrentForMaskedLM,
    RecurrentForPrediction,
    RecurrentForQuestionAnswering,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM, RecurrentModel
from hf_rnn_kernels import min_gru_scan
from hf_rnn_kernels.fused_step.program import Op, Program, Vector
from hf_rnn_kernels.layout import SequenceLayout


class MinGRU(RecurrentMixer):
    """z_t = sigmoid(W_z x_t), h~_t = g(W_h x_t), h_t = (1 - z_t) h_{t-1} + z_t h~_t (paper, sections 3.1 and B.3)."""

    num_projections = 2  # z, h~

    def initial_bias(self) -> Tensor:
        return torch.tensor([-self.config.forget_bias, 0.0]).repeat_interleave(self.config.inner_size)

    def recurrence(
        self, x: Tensor, state: tuple[Tensor | None, ...], layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        gate, candidate = self.in_proj(x).chunk(2, -1)
        h, last = min_gru_scan(gate, candidate, state[0], layout, use_g=self.config.use_g)
        return h, (last,)

    def fuse_recurrence(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        return program.gated(Op.MIN_GRU, program.linear(self.in_proj, x).chunk(2), states[0], self.config.use_g)


class MinGRUModel(RecurrentModel):
    """minGRU without a head."""

    config_class = MinGRUConfig
    mixer_class = MinGRU


class MinGRUForCausalLM(RecurrentForCausalLM):
    """minGRU language model."""

    config_class = MinGRUConfig
    model_class = MinGRUModel


class MinGRUForMaskedLM(RecurrentForMaskedLM):
    """minGRU that fills in masked tokens."""

    config_class = MinGRUConfig
    model_class = MinGRUModel


class MinGRUForTokenClassification(RecurrentForTokenClassification):
    """minGRU with a label for each token."""

    config_class = MinGRUConfig
    model_class = MinGRUModel


class MinGRUForSequenceClassification(RecurrentForSequenceClassification):
    """minGRU with a classifier of sequences."""

    config_class = MinGRUConfig
    model_class = MinGRUModel


class MinGRUForQuestionAnswering(RecurrentForQuestionAnswering):
    """minGRU that marks the answer in a text."""

    config_class = MinGRUConfig
    model_class = MinGRUModel


class MinGRUForCTC(RecurrentForCTC):
    """minGRU that transcribes."""

    config_class = MinGRUConfig
    model_class = MinGRUModel


class MinGRUForPrediction(RecurrentForPrediction):
    """minGRU that forecasts series."""

    config_class = MinGRUConfig
    model_class = MinGRUModel
