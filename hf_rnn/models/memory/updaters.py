"""What makes the next memory: (N, K, D) and the token's (N, D) to (N, K, D), not yet normalised.

Nothing carries a memory over but what the network writes: no gates in "transformer" and "mlp". Vectors come as
(N, 1, K, D), so that perturbed copies of parameters, (rows, 1, ...), meet them row by row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_rnn.layers import FeedForward, RMSNorm
from hf_rnn.layers.multi_head import has_hooks, is_bare
from hf_rnn.models.memory.configuration_memory import MemoryRNNConfig
from hf_rnn_kernels.fused_step.program import NotFusable, Op, Program, Vector
from hf_rnn_kernels.mlp_scan import mlp_scan


class Attention(nn.Module):
    """Self-attention in which every token sees all: (N, 1, L, D) to the same."""

    def __init__(self, config: MemoryRNNConfig):
        super().__init__()
        size = config.hidden_size
        self.heads = (config.num_heads, size // config.num_heads)
        self.in_proj = nn.Linear(size, 3 * size, bias=config.use_bias)
        self.out_proj = nn.Linear(size, size, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (3, *self.heads)).squeeze(1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2)[:, None])


class AttentionBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: MemoryRNNConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ff_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ff = FeedForward(config.hidden_size, config.feed_forward_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.ff(self.ff_norm(x))


class TransformerUpdater(nn.Module):
    """Bidirectional blocks over [memory; token], places told apart by a learned vector each; the first K outputs."""

    def __init__(self, config: MemoryRNNConfig):
        super().__init__()
        self.places = nn.Parameter(torch.empty(config.num_memory_tokens + 1, config.hidden_size))
        self.blocks = nn.ModuleList(AttentionBlock(config) for _ in range(config.updater_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, memory: Tensor, token: Tensor) -> Tensor:
        x = torch.cat([memory, token[:, None]], 1)[:, None] + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, :, :-1]).squeeze(1)

    def fuse(self, program: Program, memory: Vector, token: Vector) -> Vector:
        raise NotFusable("updater='transformer', whose products are those of libraries already")


class MLPUpdater(nn.Module):
    """Feed-forwards over the whole memory and the token in one vector, none of which adds to the memory."""

    def __init__(self, config: MemoryRNNConfig):
        super().__init__()
        size = max(1, int(config.memory_size * config.feed_forward_factor / 2))
        self.in_proj = nn.Linear(config.memory_size + config.hidden_size, size, bias=config.use_bias)
        layers = config.updater_layers - 1
        self.norms = nn.ModuleList(RMSNorm(size, eps=config.norm_eps) for _ in range(layers))
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=config.use_bias) for _ in range(layers))
        self.memory_proj = nn.Linear(size, config.memory_size, bias=config.use_bias)

    def forward(self, memory: Tensor, token: Tensor) -> Tensor:
        x = self.in_proj(torch.cat([memory.flatten(1), token], 1)[:, None])
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(F.gelu(x)))
        return self.memory_proj(F.gelu(x)).view_as(memory)

    def scan(self, memory: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """Normalised memories after each of several tokens: (N, K, D), (N, T, D) and (N, T) to (N, T, K, D), by one
        operator. None where this network is more than its weights, in float32 or float64."""
        norms: list[Any] = [*self.norms]
        layers: list[Any] = [*self.layers]
        linears = [self.in_proj, *layers, self.memory_proj]
        weights = [p for module in (*linears, *norms) for p in (module.weight, getattr(module, "bias", None))]
        given = all(type(p) is nn.Parameter and p.dtype == memory.dtype for p in weights if p is not None)
        bare = all(is_bare(module) for module in linears) and not any(has_hooks(module) for module in (self, *norms))
        if not (given and bare) or tokens.dtype != memory.dtype or torch.is_autocast_enabled(tokens.device.type):
            return None
        width = memory.shape[1] * memory.shape[2]
        of_memory, of_token = self.in_proj.weight.split([width, tokens.shape[-1]], 1)
        x = F.linear(tokens, of_token, self.in_proj.bias)
        inner = [layer.weight * norm.weight for layer, norm in zip(layers, norms, strict=True)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        eps = norms[0].eps if norms else 1.0
        out = self.memory_proj
        return mlp_scan(x, memory, of_memory, inner, biases, out.weight, out.bias, mask, eps=eps)

    def fuse(self, program: Program, memory: Vector, token: Vector) -> Vector:
        inputs = program.vector(memory.width + token.width)
        for part, into in zip((memory, token), inputs.split(memory.width, token.width), strict=True):
            program.pointwise(Op.COPY, part, out=into)
        x = program.linear(self.in_proj, inputs)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            normed = program.normalized(norm, program.pointwise(Op.GELU, x))
            x = program.add(x, program.linear(layer, normed))
        return program.linear(self.memory_proj, program.pointwise(Op.GELU, x))


class GRUUpdater(nn.Module):
    """A GRU cell whose state is the whole memory: m' = (1 - z) n + z m."""

    def __init__(self, config: MemoryRNNConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.memory_size, bias=config.use_bias)
        self.recurrent_proj = nn.Linear(config.memory_size, 3 * config.memory_size, bias=config.use_bias)

    def forward(self, memory: Tensor, token: Tensor) -> Tensor:
        state = memory.flatten(1)[:, None]
        x_r, x_z, x_n = self.in_proj(token[:, None]).chunk(3, -1)
        m_r, m_z, m_n = self.recurrent_proj(state).chunk(3, -1)
        new = torch.tanh(x_n + torch.sigmoid(x_r + m_r) * m_n)
        return torch.lerp(new, state, torch.sigmoid(x_z + m_z)).view_as(memory)

    def fuse(self, program: Program, memory: Vector, token: Vector) -> Vector:
        gates, recurrent = program.linear(self.in_proj, token), program.linear(self.recurrent_proj, memory)
        return program.cell(Op.GRU, gates, recurrent, [memory], heads=1)


def make_updater(config: MemoryRNNConfig) -> nn.Module:
    classes = {"transformer": TransformerUpdater, "mlp": MLPUpdater, "gru": GRUUpdater}
    return classes[config.updater](config)
