from torch import Tensor, nn
from transformers.activations import ACT2FN


class ResidualMLP(nn.Module):
    """W2 act(W1 x) + W3 x, biases in all three: how forecasters make tokens of patches and quantiles of tokens (TiDE,
    arXiv 2304.08424).

    Args:
        inputs, hidden, outputs: channels.
        activation: a name of transformers' activations.
        dropout: of W2's output.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: str = "silu", dropout: float = 0.0):
        super().__init__()
        self.hidden_proj, self.output_proj = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.skip_proj = nn.Linear(inputs, outputs)
        self.activation, self.dropout = ACT2FN[activation], nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.output_proj(self.activation(self.hidden_proj(x)))) + self.skip_proj(x)
