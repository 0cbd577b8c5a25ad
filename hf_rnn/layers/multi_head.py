from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_rnn.layers.mixer import RecurrentMixer
from hf_rnn_kernels.fused_step.program import Op, Program, Vector
from hf_rnn_kernels.packed_linear import plain


class MultiHeadMixer(RecurrentMixer):
    """What recurrences whose gates see the state share: recurrent weights, block-diagonal over heads.

    Parameters lie head by head, within a head gate by gate; with one head, as in torch.nn's `weight_ih`, `weight_hh`,
    `bias_ih` and `bias_hh` (see `hf_rnn.exchange.gate_order`).

    Attributes:
        projection: of the state, where an architecture has one.
    """

    projection: nn.Linear | None

    def __init__(self, config: Any, input_size: int | None = None):
        super().__init__(config, input_size)
        heads, size = config.num_heads, config.inner_size // config.num_heads
        self.recurrent_weight = nn.Parameter(torch.empty(heads, self.num_projections * size, size))
        biases = self.num_projections * config.inner_size
        self.recurrent_bias = nn.Parameter(torch.empty(biases)) if config.use_bias else None
        self.projection = None

    def init_weights(self) -> None:
        """Each gate's matrix of each head orthogonal, which keeps norms over many steps (Saxe et al., 1312.6120)."""
        super().init_weights()
        if not getattr(self.recurrent_weight, "_is_hf_initialized", False):
            heads, rows, size = self.recurrent_weight.shape
            weight = torch.empty(heads * self.num_projections, rows // self.num_projections, size)
            for matrix in weight:
                nn.init.orthogonal_(matrix)
            init.copy_(self.recurrent_weight, weight.view_as(self.recurrent_weight).to(self.recurrent_weight))
        if self.recurrent_bias is not None:
            init.zeros_(self.recurrent_bias)

    def to_states(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.tanh(tokens[0]), *tokens[1:]  # h, and an LSTM's c

    def fuse_cell(self, op: Op, program: Program, x: Vector, states: list[Vector]) -> Vector:
        """The instructions of a cell."""
        gates = program.linear(self.in_proj, x)  # before the state is touched: of several tokens at once
        recurrent = program.product(self.recurrent_weight, self.recurrent_bias, states[0])
        return program.cell(op, gates, recurrent, states, self.config.num_heads)

    def operands(self, x: Tensor) -> dict[str, Any]:
        """The op's arguments but states and layout. The op takes x and both weights and picks what computes, unless the
        input projection is more than a linear layer: with an adapter, hooks or a quantizer it speaks for itself."""
        weights = dict(weight=plain(self.recurrent_weight), bias=self.recurrent_bias)
        if not is_bare(self.in_proj):
            return dict(x=self.in_proj(x), **weights)
        return dict(x=x, input_weight=self.in_proj.weight, input_bias=self.in_proj.bias, **weights)


def is_bare(module: nn.Module) -> bool:
    """Whether a linear layer is its weight and bias, and nothing that its call would run beside."""
    # torch.export puts a class of its own around a module
    plain_class = (
        nn.Linear.forward is type(module).forward if torch.compiler.is_exporting() else type(module) is nn.Linear
    )
    return plain_class and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module's call would run more than its class's `forward`."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks)
