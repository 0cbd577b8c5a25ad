import torch
from torch import Tensor, nn

from hf_rnn_kernels import Perturbed


class CausalConv(nn.Module):
    """Depthwise causal convolution over time: y_t = bias + sum_j weight[:, j] * x_{t - (K-1) + j}.

    Written as K multiply-adds: on a CPU, forward and backward, a grouped conv1d and its two transposes take 1.8 times
    as long (`python benchmarks/layers.py`).
    """

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
        before = x.new_zeros(x.shape[0], history, x.shape[2]) if state is None else state.to(x.dtype)
        if mask is None and cu_seqlens is None:
            padded = torch.cat([before, x], 1)
            return self._taps(padded), _keep(padded[:, x.shape[1] :])
        # Lay the real tokens out without gaps, K - 1 zeros (or the state) before each sequence, and read back.
        real = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
        place = history + real.cumsum(1) - 1
        room = history + x.shape[1]
        if cu_seqlens is not None:
            token = torch.arange(x.shape[1], device=x.device)
            place = place + history * torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
            room = room + history * cu_seqlens.shape[0]
        padded = torch.cat([before, x.new_zeros(x.shape[0], room - history, x.shape[2])], 1)
        padded = padded.scatter_add(1, _expand(place, x), x * real[..., None])  # padding adds zero
        y = self._taps(padded)
        y = y.gather(1, _expand((place - history).clamp(min=0), x))
        if cu_seqlens is not None:
            return y, None
        last = real.sum(1, keepdim=True) + torch.arange(history, device=x.device)
        return y, _keep(padded.gather(1, _expand(last, x)))

    def _taps(self, padded: Tensor) -> Tensor:
        time = padded.shape[1] - self.kernel_size + 1
        if time == 1 and not isinstance(self.weight, Perturbed):  # a step of decoding: few calls
            return (padded * self.weight.mT).sum(1, keepdim=True) + self.bias
        y: Tensor = self.bias
        for j, weight in enumerate(self.weight.unbind(-1)):
            y = torch.addcmul(y, padded[:, j : j + time], weight)
        return y


def _keep(state: Tensor) -> Tensor:
    """A copy in float32, or float64: a view would keep the whole sequence alive."""
    return state.to(torch.promote_types(state.dtype, torch.float32), copy=True)


def _expand(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[2])
