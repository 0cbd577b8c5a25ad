"""The sLSTM layer, as published and gated."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_rnn.layers import BlockLinear, CausalConv, Mixer, MultiHeadNorm
from hf_rnn.models.xlstm.configuration_xlstm import XLSTMConfig
from hf_rnn.models.xlstm.mlstm import check_normalized, init_block_linear
from hf_rnn_kernels import silu_gate, slstm_scan
from hf_rnn_kernels.fused_step.program import Op, Program, Vector
from hf_rnn_kernels.layout import SequenceLayout
from hf_rnn_kernels.packed_linear import plain


class SLSTMCell(Mixer):
    """c_t = f_t c_{t-1} + i_t tanh(z_t), n_t = f_t n_{t-1} + i_t, h_t = norm(sigmoid(o_t) c_t / n_t), i_t exponential.

    The pre-activations i, f, z, o are what a layer makes of x, and the recurrence of h_{t-1}, each head for itself
    (xLSTM, arXiv 2405.04517). A layer gives `make_projections`, `gates` and `output`.
    """

    def __init__(self, config: XLSTMConfig, layer_idx: int, width: int):
        super().__init__()
        self.num_heads, size = config.num_heads, width // config.num_heads
        self.conv = CausalConv(config.hidden_size, config.conv_kernel)
        self.make_projections(config, width)
        self.recurrent_weight = nn.Parameter(torch.empty(config.num_heads, 4 * size, size))
        self.recurrent_bias = nn.Parameter(torch.empty(4 * width))
        self.norm = MultiHeadNorm(width, config.epsilon)
        self.state_shapes = [(width,)] * 4 + [self.conv.state_shape]
        self.depth = layer_idx / max(config.num_hidden_layers - 1, 1)

    @abstractmethod
    def make_projections(self, config: XLSTMConfig, width: int) -> None:
        """Make the layer's own weights, of a cell of so many channels."""

    @abstractmethod
    def gates(self, x: Tensor, convolved: Tensor) -> Tensor:
        """x and its convolution (B, T, D) to i, f, z, o of each head (B, T, 4 * width)."""

    @abstractmethod
    def output(self, h: Tensor, x: Tensor) -> Tensor:
        """h (B, T, width), normalised, and x to (B, T, D)."""

    def init_weights(self) -> None:
        """No recurrence at first; forget gates from open (bias 5) to closed (-7) over a head's units, more of them open
        in the blocks nearer the output (the paper's code)."""
        init.zeros_(self.recurrent_weight)
        bias = initial_gates(self.num_heads, self.recurrent_weight.shape[2], self.depth)
        init.copy_(self.recurrent_bias, bias.to(self.recurrent_bias))

    def read(self, state: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return self.output(self._normalized(state[0].to(self.norm.weight.dtype)), x)

    def to_states(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """h below 1; c below n, of which it is a mean; n above 1, the weight of the largest gate."""
        h, c, n, m, conv_state = tokens
        n = 1 + nn.functional.softplus(n)
        return torch.tanh(h), n * torch.tanh(c), n, m, conv_state

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_normalized(self, "recurrent_weight")
        h, c, n, m, conv_state = state or (None,) * 5
        convolved, conv_state = self.conv(x, conv_state, layout)
        gates = self.gates(x, convolved)
        h, last = slstm_scan(gates, plain(self.recurrent_weight), self.recurrent_bias, h, c, n, m, layout)
        return self.output(self._normalized(h), x), (*last, conv_state)

    def fuse_cell(self, program: Program, gates: Vector, states: list[Vector]) -> Vector:
        """i, f, z, o of each head to h, normalised."""
        recurrent = program.product(self.recurrent_weight, self.recurrent_bias, states[0])
        h = program.cell(Op.SLSTM, gates, recurrent, states[:4], self.num_heads)
        return program.norm(h, self.norm.weight, self.norm.eps, self.num_heads, centred=True)

    def _normalized(self, h: Tensor) -> Tensor:
        return self.norm(h.unflatten(-1, (self.num_heads, -1)))


def initial_gates(heads: int, size: int, depth: float) -> Tensor:
    """Biases of i, f, z, o of each head, (heads * 4 * size,), in a block at `depth`, 0 for the first and 1 for the
    last."""
    bias = torch.zeros(heads, 4, size)
    bias[:, 1] = 5.0 - 12.0 * (torch.arange(size) / max(size - 1, 1)) ** (0.3 + 1.3 * depth)
    return bias.flatten()


class SLSTM(SLSTMCell):
    """The paper's layer (figure 9): i and f from SiLU(conv(x)), z and o from x, each head for itself; gives h."""

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.hidden_size)

    def make_projections(self, config: XLSTMConfig, width: int) -> None:
        size, self.std = width // config.num_heads, config.initial_std
        self.if_proj = BlockLinear(config.num_heads, size, 2 * size, bias=False)
        self.zo_proj = BlockLinear(config.num_heads, size, 2 * size, bias=False)

    def init_weights(self) -> None:
        init_block_linear(self.std, self.if_proj, self.zo_proj)
        super().init_weights()

    def gates(self, x: Tensor, convolved: Tensor) -> Tensor:
        halves = [self.if_proj(nn.functional.silu(convolved)), self.zo_proj(x)]
        return torch.cat([y.unflatten(-1, (self.num_heads, -1)) for y in halves], -1).flatten(-2)

    def output(self, h: Tensor, x: Tensor) -> Tensor:
        return h

    def fuse(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        convolved = program.pointwise(Op.SILU, program.conv(self.conv, x, states[4]))
        gates, size = program.vector(4 * x.width), x.width // self.num_heads
        for head in range(self.num_heads):  # i and f, then z and o
            own, at = slice(head * size, (head + 1) * size), 4 * head * size
            program.product(self.if_proj.weight[head, None], None, convolved[own], gates[at : at + 2 * size])
            program.product(self.zo_proj.weight[head, None], None, x[own], gates[at + 2 * size : at + 4 * size])
        return self.fuse_cell(program, gates, states)


class GatedSLSTM(SLSTMCell):
    """W_out(h * SiLU(W_gate x)), all pre-activations from conv(x): the gated layout of `RecurrentBlockConfig`."""

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.sizes["inner_size"])

    def make_projections(self, config: XLSTMConfig, width: int) -> None:
        self.in_proj = nn.Linear(config.hidden_size, 4 * width, bias=config.use_bias)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.use_bias)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=config.use_bias)
        self.output_std = config.initial_output_std

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.out_proj.weight, std=self.output_std)

    def gates(self, x: Tensor, convolved: Tensor) -> Tensor:
        return self.in_proj(convolved)

    def output(self, h: Tensor, x: Tensor) -> Tensor:
        return self.out_proj(silu_gate(h, self.gate_proj(x)))

    def fuse(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        gates = program.linear(self.in_proj, program.conv(self.conv, x, states[4]))
        h = self.fuse_cell(program, gates, states)
        gated = program.pointwise(Op.SILU_MULTIPLY, h, program.linear(self.gate_proj, x))
        return program.linear(self.out_proj, gated)
