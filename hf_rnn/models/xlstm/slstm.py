"""The sLSTM layer, as published and gated."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_rnn.layers import BlockLinear, CausalConv, Mixer, MultiHeadNorm
from hf_rnn.models.xlstm.configuration_xlstm import XLSTMConfig
from hf_rnn.models.xlstm.mlstm import check_normalized, init_block_linear
from hf_rnn_kernels import silu_gate, slstm_scan
from hf_rnn_kernels.layout import SequenceLayout


class SLSTM(Mixer):
    """c_t = f_t c_{t-1} + i_t tanh(z_t), n_t = f_t n_{t-1} + i_t, h_t = norm(sigmoid(o_t) c_t / n_t), i_t exponential.

    i and f come from SiLU(conv(x)), z and o from x, all four also from h_{t-1}, each head for itself (xLSTM, arXiv
    2405.04517, figure 9).
    """

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        size = width // config.num_heads
        self.conv = CausalConv(width, config.conv_kernel)
        self.if_proj = BlockLinear(config.num_heads, size, 2 * size, bias=False)
        self.zo_proj = BlockLinear(config.num_heads, size, 2 * size, bias=False)
        self.recurrent_weight = nn.Parameter(torch.empty(config.num_heads, 4 * size, size))
        self.recurrent_bias = nn.Parameter(torch.empty(config.num_heads * 4 * size))
        self.norm = MultiHeadNorm(width, config.epsilon)
        self.state_shapes = [(width,)] * 4 + [self.conv.state_shape]
        self.std, self.depth = config.initial_std, layer_idx / max(config.num_hidden_layers - 1, 1)

    def init_weights(self) -> None:
        init_block_linear(self.std, self.if_proj, self.zo_proj)
        init_recurrence(self.recurrent_weight, self.recurrent_bias, self.depth)

    def read(self, state: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return self.norm(state[0].unflatten(-1, (self.num_heads, -1)).to(self.norm.weight.dtype))

    def to_states(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return memory_states(tokens)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_normalized(self, "recurrent_weight")
        h, c, n, m, conv_state = state or (None,) * 5
        convolved, conv_state = self.conv(x, conv_state, layout)
        halves = [self.if_proj(nn.functional.silu(convolved)), self.zo_proj(x)]
        gates = torch.cat([y.unflatten(-1, (self.num_heads, -1)) for y in halves], -1).flatten(-2)
        h, last = slstm_scan(gates, self.recurrent_weight, self.recurrent_bias, h, c, n, m, layout)
        return self.norm(h.unflatten(-1, (self.num_heads, -1))), (*last, conv_state)


class GatedSLSTM(Mixer):
    """W_out(norm(h) * SiLU(W_gate x)), h the sLSTM over conv(x): the gated layout of `RecurrentBlockConfig`."""

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__()
        width, inner, self.num_heads = config.hidden_size, config.sizes["inner_size"], config.num_heads
        size = inner // config.num_heads
        self.conv = CausalConv(width, config.conv_kernel)
        self.in_proj = nn.Linear(width, 4 * inner, bias=config.use_bias)  # i, f, z, o of each head
        self.gate_proj = nn.Linear(width, inner, bias=config.use_bias)
        self.recurrent_weight = nn.Parameter(torch.empty(config.num_heads, 4 * size, size))
        self.recurrent_bias = nn.Parameter(torch.empty(4 * inner))
        self.norm = MultiHeadNorm(inner, config.epsilon)
        self.out_proj = nn.Linear(inner, width, bias=config.use_bias)
        self.state_shapes = [(inner,)] * 4 + [self.conv.state_shape]
        self.depth, self.output_std = layer_idx / max(config.num_hidden_layers - 1, 1), config.initial_output_std

    def init_weights(self) -> None:
        init_recurrence(self.recurrent_weight, self.recurrent_bias, self.depth)
        init.normal_(self.out_proj.weight, std=self.output_std)

    def read(self, state: tuple[Tensor, ...], x: Tensor) -> Tensor:
        h = self.norm(state[0].unflatten(-1, (self.num_heads, -1)).to(self.norm.weight.dtype))
        return self.out_proj(silu_gate(h, self.gate_proj(x)))

    def to_states(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return memory_states(tokens)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_normalized(self, "recurrent_weight")
        h, c, n, m, conv_state = state or (None,) * 5
        convolved, conv_state = self.conv(x, conv_state, layout)
        gates = self.in_proj(convolved)
        h, last = slstm_scan(gates, self.recurrent_weight, self.recurrent_bias, h, c, n, m, layout)
        h = self.norm(h.unflatten(-1, (self.num_heads, -1)))
        return self.out_proj(silu_gate(h, self.gate_proj(x))), (*last, conv_state)


def init_recurrence(weight: Tensor, bias: Tensor, depth: float) -> None:
    """No recurrence at first; forget gates from open (bias 5) to closed (-7) over a head's units, more of them open in
    the blocks nearer the output, whose depth is 1 (the paper's code)."""
    init.zeros_(weight)
    heads, _, size = weight.shape
    initial = torch.zeros(heads, 4, size)
    initial[:, 1] = 5.0 - 12.0 * (torch.arange(size) / max(size - 1, 1)) ** (0.3 + 1.3 * depth)
    init.copy_(bias, initial.flatten().to(bias))


def memory_states(tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """h below 1; c below n, of which it is a mean; n above 1, the weight of the largest gate."""
    h, c, n, m, conv_state = tokens
    n = 1 + nn.functional.softplus(n)
    return torch.tanh(h), n * torch.tanh(c), n, m, conv_state
