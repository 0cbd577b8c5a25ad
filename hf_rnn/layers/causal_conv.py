import torch
from torch import Tensor, nn

from hf_rnn_kernels import causal_conv


class CausalConv(nn.Module):
    """Depthwise causal convolution over time: y_t = bias + sum_j weight[:, j] * x_{t - (K-1) + j}."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.state_shape = (kernel_size - 1, channels)
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(
        self, x: Tensor, state: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Convolve.

        Args:
            x: (B, T, D).
            state: the K - 1 inputs before x, (B, K - 1, D) float32; zeros by default.
            mask: (B, T), zero at padding: such a token is passed over, as if it were not there.
            cu_seqlens: offsets of packed sequences; the convolution does not reach over them.

        Returns:
            y like x, and the state after the last real token (None when packed).
        """
        history = self.kernel_size - 1
        before = x.new_zeros(x.shape[0], history, x.shape[2]) if state is None else state
        if mask is None and cu_seqlens is None:
            return causal_conv(x, before, self.weight, self.bias)
        # Lay the real tokens out without gaps, K - 1 zeros between sequences, and read back.
        real = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
        place = real.cumsum(1) - 1
        room = x.shape[1]
        if cu_seqlens is not None:
            token = torch.arange(x.shape[1], device=x.device)
            place = place + history * torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
            room = room + history * (cu_seqlens.shape[0] - 1)
        index = _expand(place.clamp(min=0), x)
        laid = x.new_zeros(x.shape[0], room, x.shape[2])
        laid = laid.scatter_add(1, index, x * real[..., None])  # padding adds zero
        y = causal_conv(laid, before, self.weight, self.bias)[0].gather(1, index)
        if cu_seqlens is not None:
            return y, None
        last = real.sum(1, keepdim=True) + torch.arange(history, device=x.device)
        ends = torch.cat([before.to(x.dtype), laid], 1).gather(1, _expand(last, x))
        return y, ends.to(torch.promote_types(x.dtype, torch.float32))


def _expand(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[2])
