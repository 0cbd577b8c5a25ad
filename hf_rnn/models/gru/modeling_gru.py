"""GRU, dense as in torch.nn or with heads: what the other architectures are compared with."""

import torch
from torch import nn

from hf_rnn.exchange.torch_nn import TorchExchangeModel
from hf_rnn.layers import MultiHeadMixer
from hf_rnn.models.gru.configuration_gru import GRUConfig
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM, RecurrentForSequenceClassification
from hf_rnn_kernels import gru_scan


class GRU(MultiHeadMixer):
    """r, z = sigmoid(W x_t + R h_{t-1} + b); n = tanh(W x_t + b + r (R h_{t-1} + b')); h_t = (1 - z) n + z h_{t-1}."""

    num_projections = 3  # r, z, n

    def initial_bias(self):
        one_head = torch.tensor([0.0, self.config.forget_bias, 0.0])
        return one_head.repeat_interleave(self.recurrent_weight.shape[2]).repeat(self.config.num_heads)

    def recurrence(self, x, state, mask, cu_seqlens):
        if self.cell_applies(x, state, mask, cu_seqlens):
            h = torch.gru_cell(x[:, 0], state[0], *self.cell_arguments())
            return h[:, None].clone(), (h,)  # the state is written to in place later
        if self.library_applies(x, state, mask, cu_seqlens) and x.is_cuda:  # on a CPU torch's is a loop over time
            (h0,), *arguments = self.library_arguments(x, state)
            h, last = torch.gru(x, h0, *arguments)
            return h, (self.to_state_dtype(last[0]),)
        h, last = gru_scan(self.in_proj(x), self.recurrent_weight, self.recurrent_bias, state[0], mask, cu_seqlens)
        return h, (last,)


class GRUModel(TorchExchangeModel):
    """GRU without a head."""

    config_class = GRUConfig
    mixer_class = GRU
    torch_class = nn.GRU


class GRUForCausalLM(RecurrentForCausalLM):
    """GRU language model."""

    config_class = GRUConfig
    model_class = GRUModel


class GRUForSequenceClassification(RecurrentForSequenceClassification):
    """GRU with a classifier on the last real token."""

    config_class = GRUConfig
    model_class = GRUModel
