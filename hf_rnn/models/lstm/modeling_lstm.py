"""LSTM, dense as in torch.nn or with heads: what the other architectures are compared with."""

import torch
from torch import nn

from hf_rnn.exchange.torch_nn import TorchExchangeModel
from hf_rnn.layers import MultiHeadMixer
from hf_rnn.models.lstm.configuration_lstm import LSTMConfig
from hf_rnn.skeleton.modeling_recurrent import RecurrentForCausalLM, RecurrentForSequenceClassification
from hf_rnn_kernels import lstm_scan
from hf_rnn_kernels.threads import available


class LSTM(MultiHeadMixer):
    """i, f, g, o = W x_t + R h_{t-1} + b; c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g); h_t = sigmoid(o) tanh(c_t)."""

    num_projections = 4  # i, f, g, o
    num_states = 2  # h, c

    def initial_bias(self):
        one_head = torch.tensor([0.0, self.config.forget_bias, 0.0, 0.0])
        return one_head.repeat_interleave(self.recurrent_weight.shape[2]).repeat(self.config.num_heads)

    def recurrence(self, x, state, mask, cu_seqlens):
        if self.cell_applies(x, state, mask, cu_seqlens):
            h, c = torch.lstm_cell(x[:, 0], state, *self.cell_arguments())
            return h[:, None].clone(), (h, c)  # the state is written to in place later
        if self.library_applies(x, state, mask, cu_seqlens) and (x.is_cuda or self._one_dnn_applies(x)):
            h, *last = torch.lstm(x, *self.library_arguments(x, state))
            return h, tuple(self.to_state_dtype(s[0]) for s in last)
        h0, c0 = state
        return lstm_scan(self.in_proj(x), self.recurrent_weight, self.recurrent_bias, h0, c0, mask, cu_seqlens)

    def _one_dnn_applies(self, x):
        """On a CPU torch's LSTM is oneDNN's in float32, and a loop over time otherwise. Ours is faster where several
        long sequences of moderate width go through it (docs/log.md, 2026-11-26)."""
        in_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        long = x.shape[0] >= 8 and x.shape[1] >= 256 and self.config.inner_size <= 384
        ours = long and (torch.is_grad_enabled() or x.shape[0] < 64) and available()
        return x.device.type == "cpu" and in_float32 and torch.backends.mkldnn.is_available() and not ours


class LSTMModel(TorchExchangeModel):
    """LSTM without a head."""

    config_class = LSTMConfig
    mixer_class = LSTM
    torch_class = nn.LSTM


class LSTMForCausalLM(RecurrentForCausalLM):
    """LSTM language model."""

    config_class = LSTMConfig
    model_class = LSTMModel


class LSTMForSequenceClassification(RecurrentForSequenceClassification):
    """LSTM with a classifier on the last real token."""

    config_class = LSTMConfig
    model_class = LSTMModel
