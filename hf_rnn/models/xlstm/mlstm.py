"""The two published mLSTM layers."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import initialization as init

from hf_rnn.layers import BlockLinear, CausalConv, Mixer, MultiHeadNorm, scan_ahead
from hf_rnn.models.xlstm.configuration_xlstm import XLSTMConfig
from hf_rnn_kernels import mlstm_scan
from hf_rnn_kernels.checks import values_known
from hf_rnn_kernels.fused_step.program import Op, Program, Vector
from hf_rnn_kernels.layout import SequenceLayout

FORGET_BIASES = (3.0, 6.0)  # from the first head's to the last's: heads that keep for 20 to 400 tokens at first


class MLSTM(Mixer):
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, h_t = o_t * norm(C_t^T q_t / max(|n_t q_t|, 1)): a matrix as memory.

    i = exp(c tanh(W_i x / c)), f = sigmoid(c tanh(W_f x / c)), o = sigmoid(W_o x), and q, k, v are linear in x
    (xLSTM-7B, arXiv 2503.13427). n is C with ones for values.
    """

    exact_parts = ("gate_proj",)  # exponentials

    def __init__(self, config: XLSTMConfig):
        super().__init__()
        self.num_heads, self.soft_cap = config.num_heads, config.gate_soft_cap
        queries, values = config.sizes["qk_size"], config.sizes["v_size"]
        self.split = [queries, queries, values, values]
        keys = queries // config.num_heads
        self.state_shapes = [(config.num_heads, keys, values // config.num_heads), (config.num_heads, keys)]
        self.state_shapes.append((config.num_heads,))
        self.in_proj = nn.Linear(config.hidden_size, sum(self.split), bias=config.use_bias)  # q, k, v, o
        self.gate_proj = nn.Linear(config.hidden_size, 2 * config.num_heads)  # i, f
        self.norm = MultiHeadNorm(values, config.epsilon)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=config.use_bias)
        self.output_std = config.initial_output_std

    def init_weights(self) -> None:
        """Gates from their biases alone at first; nearly closed input gates (arXiv 2503.13427)."""
        forget = torch.linspace(*FORGET_BIASES, self.num_heads)
        init.zeros_(self.gate_proj.weight)
        init.copy_(self.gate_proj.bias, torch.cat([torch.full_like(forget, -10.0), forget]).to(self.gate_proj.bias))
        init.normal_(self.out_proj.weight, std=self.output_std)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout, ahead: int = 0
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `Mixer.forward`; the last `ahead` tokens leave the state as it is."""
        check_normalized(self.gate_proj, "weight")
        *qkv, o = self.in_proj(x).split(self.split, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in qkv)
        gates = self.gate_proj(x).float() if x.dtype != torch.float64 else self.gate_proj(x)
        if self.soft_cap is not None:
            gates = self.soft_cap * torch.tanh(gates / self.soft_cap)
        i, f = gates.chunk(2, -1)
        h, last = scan_ahead(mlstm_scan, (q, k, v, i, f), state or (None,) * 3, layout, ahead)
        return self.out_proj(self.norm(h, o)), last

    def fuse(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        q, k, v, o = program.linear(self.in_proj, x).split(*self.split)
        gates = program.linear(self.gate_proj, x)
        if self.soft_cap is not None:
            gates = program.pointwise(Op.SOFT_CAP, gates, cap=self.soft_cap)
        h = program.mlstm(q, k, v, gates, states, self.num_heads)
        normed = program.norm(h, self.norm.weight, self.norm.eps, self.num_heads, centred=True)
        return program.linear(self.out_proj, program.pointwise(Op.SIGMOID_MULTIPLY, normed, o))


class UpProjectedMLSTM(Mixer):
    """The mLSTM of the first paper (arXiv 2405.04517, figure 10), between an up- and a down-projection.

    x, z = W_up u; q and k are projections in small blocks of c = SiLU(conv(x)), v of x; the gates are linear in q, k
    and v; and the layer gives W_down ((norm(h) + skip * c) * SiLU(z)).
    """

    exact_parts = ("gate_proj",)  # exponentials

    def __init__(self, config: XLSTMConfig):
        super().__init__()
        inner, block = config.sizes["inner_size"], config.qkv_block_size
        self.num_heads, size = config.num_heads, inner // config.num_heads
        self.state_shapes = [(config.num_heads, size, size), (config.num_heads, size), (config.num_heads,)]
        self.up_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.use_bias)
        self.conv = CausalConv(inner, config.conv_kernel)
        self.q_proj, self.k_proj, self.v_proj = (
            BlockLinear(inner // block, block, block, config.use_bias) for _ in range(3)
        )
        self.gate_proj = nn.Linear(3 * inner, 2 * config.num_heads)  # i, f
        self.norm = MultiHeadNorm(inner, config.epsilon)
        self.skip = nn.Parameter(torch.empty(inner))
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)
        self.state_shapes.append(self.conv.state_shape)
        self.std, self.output_std = config.initial_std, config.initial_output_std

    def init_weights(self) -> None:
        init.normal_(self.gate_proj.bias, std=0.1)
        forget = torch.linspace(*FORGET_BIASES, self.num_heads)
        if not getattr(self.gate_proj.bias, "_is_hf_initialized", False):
            with torch.no_grad():
                self.gate_proj.bias[self.num_heads :] = forget.to(self.gate_proj.bias)
        init.zeros_(self.gate_proj.weight)
        init.ones_(self.skip)
        init_block_linear(self.std, self.q_proj, self.k_proj, self.v_proj)
        init.normal_(self.down_proj.weight, std=self.output_std)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, layout: SequenceLayout
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_normalized(self.gate_proj, "weight")
        inner, z = self.up_proj(x).chunk(2, -1)
        C, n, m, conv_state = state or (None, None, None, None)
        convolved, conv_state = self.conv(inner, conv_state, layout)
        convolved = nn.functional.silu(convolved)
        q, k, v = self.q_proj(convolved), self.k_proj(convolved), self.v_proj(inner)
        i, f = self.gate_proj(torch.cat([q, k, v], -1)).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        h, last = mlstm_scan(q, k, v, i, f, C, n, m, layout)
        y = (self.norm(h) + self.skip * convolved) * nn.functional.silu(z)
        return self.down_proj(y), (*last, conv_state)

    def fuse(self, program: Program, x: Vector, states: list[Vector]) -> Vector:
        inner, z = program.linear(self.up_proj, x).chunk(2)
        convolved = program.pointwise(Op.SILU, program.conv(self.conv, inner, states[3]))
        qkv = program.vector(3 * inner.width)
        q, k, v = qkv.chunk(3)
        program.product(self.q_proj.weight, self.q_proj.bias, convolved, q)
        program.product(self.k_proj.weight, self.k_proj.bias, convolved, k)
        program.product(self.v_proj.weight, self.v_proj.bias, inner, v)
        h = program.mlstm(q, k, v, program.linear(self.gate_proj, qkv), states[:3], self.num_heads)
        normed = program.norm(h, self.norm.weight, self.norm.eps, self.num_heads, centred=True)
        skipped = program.pointwise(Op.MULTIPLY, convolved, program.weight(self.skip))
        gated = program.pointwise(Op.SILU_MULTIPLY, program.add(normed, skipped), z)
        return program.linear(self.down_proj, gated)


def init_block_linear(std: float, *layers: BlockLinear) -> None:
    for layer in layers:
        init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            init.zeros_(layer.bias)


def check_normalized(module: nn.Module, name: str) -> None:
    """Raise ValueError where a parametrization divides a weight that starts at zero by its norm."""
    if not parametrize.is_parametrized(module, name):
        return
    weight = getattr(module, name)
    if values_known(weight) and bool(weight.isnan().any()):
        raise ValueError(
            f"{name}: NaN, made by a parametrization ({module.parametrizations[name][0]}); it starts at zero, which "  # type: ignore[index]
            "spectral_norm and weight_norm cannot divide by its norm: initialise it before (nn.init.orthogonal_)"
        )
