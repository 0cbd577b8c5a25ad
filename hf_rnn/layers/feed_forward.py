from collections.abc import Callable

from torch import Tensor, nn

from hf_rnn_kernels import swiglu


class FeedForward(nn.Module):
    """down(GELU(up(x))), the position-wise network of the minGRU paper's blocks."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class GatedFeedForward(nn.Module):
    """down(activation(gate) * up) with gate, up = up_proj(x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Callable[[Tensor], Tensor], bias: bool):
        super().__init__()
        self.activation = activation
        self.up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        if self.activation is nn.functional.silu:
            return self.down_proj(swiglu(x))
        gate, up = x.chunk(2, -1)
        return self.down_proj(self.activation(gate) * up)
