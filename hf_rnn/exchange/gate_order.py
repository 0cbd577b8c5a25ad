"""LSTM and GRU weights to and from other layouts: torch.nn's, and FlashRNN's.

Ours lie head by head, within a head gate by gate, in torch's order of gates (i, f, g, o and r, z, n).
"""

import torch
from torch import Tensor

from hf_rnn.layers import MultiHeadMixer

# FlashRNN's gates of R, and of b where it has one more: n of R h, r, z, n of the input
_FLASH_RNN_GRU = [1, 2, 0]


def to_head_major(x: Tensor, num_gates: int, num_heads: int) -> Tensor:
    """(gates * H * P, ...), gate by gate as torch and FlashRNN have it, to (H * gates * P, ...), head by head."""
    return x.unflatten(0, (num_gates, num_heads, -1)).transpose(0, 1).flatten(0, 2)


def to_gate_major(x: Tensor, num_gates: int, num_heads: int) -> Tensor:
    """The inverse of `to_head_major`."""
    return x.unflatten(0, (num_heads, num_gates, -1)).transpose(0, 1).flatten(0, 2)


def from_flashrnn(function: str, R: Tensor, b: Tensor) -> dict[str, Tensor]:
    """FlashRNN's weights as part of a mixer's state dict.

    Its input projection is its caller's: a linear layer's weight and bias there, gate by gate, become `in_proj` through
    `to_head_major`, its bias added to the one returned here.

    Args:
        function: "lstm" or "gru".
        R: (gates, H, P, P).
        b: (4, H, P); for "gru" b_hn, b_r, b_z, b_in.

    Returns:
        `recurrent_weight` (H, gates * P, P), `recurrent_bias` and `in_proj.bias` (H * gates * P,).
    """
    if function not in ("lstm", "gru"):
        raise ValueError(f"function: expected 'lstm' or 'gru', got {function!r}")
    gates = {"lstm": 4, "gru": 3}[function]
    if R.dim() != 4 or R.shape[0] != gates or R.shape[2] != R.shape[3]:
        raise ValueError(f"R: expected shape ({gates}, H, P, P) for {function}, got {tuple(R.shape)}")
    if b.shape != (4, *R.shape[1:3]):
        raise ValueError(f"b: expected shape {(4, *R.shape[1:3])}, got {tuple(b.shape)}")
    recurrent_bias = torch.zeros_like(b[:gates])
    if function == "gru":
        R = R[_FLASH_RNN_GRU]
        recurrent_bias[2] = b[0]
        b = b[1:]
    return {
        "recurrent_weight": R.transpose(0, 1).flatten(1, 2).clone(),
        "recurrent_bias": recurrent_bias.transpose(0, 1).flatten(),
        "in_proj.bias": b.transpose(0, 1).flatten().clone(),
    }


def to_flashrnn(mixer: MultiHeadMixer) -> tuple[Tensor, Tensor]:
    """R (gates, H, P, P) and b (4, H, P) for FlashRNN, whose Wx is then `mixer.in_proj` without its bias."""
    heads, gates, size = mixer.config.num_heads, mixer.num_projections, mixer.recurrent_weight.shape[2]
    R = mixer.recurrent_weight.detach().unflatten(1, (gates, size)).transpose(0, 1)
    zeros = R.new_zeros(gates, heads, size)
    if mixer.recurrent_bias is None:
        recurrent, of_input = zeros, zeros
    else:
        recurrent, of_input = (
            x.detach().view(heads, gates, size).transpose(0, 1) for x in (mixer.recurrent_bias, mixer.in_proj.bias)
        )
    if gates == 4:
        return R.clone(memory_format=torch.contiguous_format), recurrent + of_input
    both = recurrent + of_input
    return R[[2, 0, 1]].contiguous(), torch.stack([recurrent[2], both[0], both[1], of_input[2]])
