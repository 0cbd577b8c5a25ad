from torch import Tensor, nn

from hf_rnn_kernels import gated_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm with a backward that is fast on a CPU as well."""

    def __init__(self, channels: int, eps: float):
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, float(self.eps))  # type: ignore[arg-type]


class MultiHeadNorm(nn.LayerNorm):
    """LayerNorm of each head for itself, with a weight per channel, no bias: (..., H, P) to (..., H * P).

    With a gate (..., H * P), sigmoid(gate) * that.
    """

    def __init__(self, channels: int, eps: float):
        super().__init__(channels, eps=eps, bias=False)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            return gated_norm(x, gate, self.weight, self.eps)
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight
