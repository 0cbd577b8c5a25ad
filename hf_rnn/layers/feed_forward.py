from collections.abc import Callable

from torch import Tensor, nn

from hf_rnn_kernels import swiglu
from hf_rnn_kernels.fused_step.program import NotFusable, Op, Program, Vector


class FeedForward(nn.Module):
    """down(GELU(up(x))), the position-wise network of the minGRU paper's blocks."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))

    def fuse(self, program: Program, x: Vector) -> Vector:
        return program.linear(self.down_proj, program.pointwise(Op.GELU, program.linear(self.up_proj, x)))


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

    def fuse(self, program: Program, x: Vector) -> Vector:
        gate, up = program.linear(self.up_proj, x).chunk(2)
        op = {nn.functional.silu: Op.SILU_MULTIPLY, nn.functional.gelu: Op.GELU_MULTIPLY}.get(self.activation)
        if op is None:
            raise NotFusable(f"an activation, {self.activation}, that has no instruction")
        gated = program.pointwise(op, up, gate)
        return program.linear(self.down_proj, gated)
