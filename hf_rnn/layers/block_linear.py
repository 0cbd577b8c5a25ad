import torch
from torch import Tensor, nn


class BlockLinear(nn.Module):
    """A linear layer whose matrix is block-diagonal: (..., G * I) to (..., G * O), G blocks (O, I).

    Initialised by the mixer it is part of.
    """

    def __init__(self, blocks: int, in_size: int, out_size: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, out_size, in_size))
        self.bias = nn.Parameter(torch.empty(blocks * out_size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("...gi,goi->...go", x.unflatten(-1, (self.weight.shape[0], -1)), self.weight).flatten(-2)
        return y if self.bias is None else y + self.bias
