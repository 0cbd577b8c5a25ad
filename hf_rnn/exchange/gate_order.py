"""LSTM and GRU weights to and from other layouts: torch.nn's, FlashRNN's, and ONNX's.

Ours lie head by head, within a head gate by gate, in torch's order of gates (i, f, g, o and r, z, n), which is cuDNN's.
"""

import torch
from torch import Tensor, nn

from hf_rnn.layers import MultiHeadMixer

# FlashRNN's gates of R, and of b where it has one more: n of R h, r, z, n of the input
_FLASH_RNN_GRU = [1, 2, 0]
# By their number: ONNX's gates i, o, f, c among torch's i, f, g, o; ONNX's z, r, h among torch's r, z, n
ONNX_GATES = {4: [0, 3, 1, 2], 3: [1, 0, 2]}


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


def from_onnx_node(
    W: Tensor, R: Tensor, B: Tensor | None = None, linear_before_reset: int = 0, layer: int = 0
) -> dict[str, Tensor]:
    """An ONNX LSTM or GRU node's weights as part of the state dict of a `torch.nn.LSTM` (`GRU`), for `from_torch`.

    The node has ONNX's default activations, and no peepholes, `clip` or `input_forget`.

    Args:
        W: (D, gates * P, I), for D = 1 or 2 directions and 4 gates, of an LSTM, or 3, of a GRU.
        R: (D, gates * P, P).
        B: (D, 2 * gates * P), the biases of W before those of R; None: the network has none.
        linear_before_reset: as the node has it; the default is ONNX's.
        layer: of the network.

    Returns:
        `weight_ih_l0` (gates * P, I), `weight_hh_l0` (gates * P, P), and, with B, `bias_ih_l0`, `bias_hh_l0`
        (gates * P,); the second direction's with `_reverse` after that.

    Raises:
        ValueError: other shapes; a GRU with `linear_before_reset` 0.
    """
    if R.dim() != 3 or R.shape[0] not in (1, 2) or R.shape[1] not in (3 * R.shape[2], 4 * R.shape[2]):
        raise ValueError(f"R: expected shape (D, 4 * P, P) or (D, 3 * P, P), D of 1 or 2, got {tuple(R.shape)}")
    directions, rows, size = R.shape
    if W.dim() != 3 or W.shape[:2] != R.shape[:2]:
        raise ValueError(f"W: expected shape ({directions}, {rows}, I) beside R, got {tuple(W.shape)}")
    if B is not None and B.shape != (directions, 2 * rows):
        raise ValueError(f"B: expected shape {(directions, 2 * rows)}, got {tuple(B.shape)}")
    if rows == 3 * size and not linear_before_reset:
        raise ValueError(
            "linear_before_reset: expected 1 of a GRU, n = tanh(W x + b + r (R h + b')), as here and in torch.nn; with "
            "0 (Keras: reset_after=False) the gate r stands before R, n = tanh(W x + R (r h) + b + b'), another cell"
        )
    gates = rows // size
    order = torch.tensor(ONNX_GATES[gates]).argsort()
    parts = {"weight_ih": W, "weight_hh": R}
    if B is not None:
        parts |= {"bias_ih": B[:, :rows], "bias_hh": B[:, rows:]}
    return {
        f"{name}_l{layer}{suffix}": of_direction.unflatten(0, (gates, size))[order].flatten(0, 1)
        for name, part in parts.items()
        for suffix, of_direction in zip(("", "_reverse"), part, strict=False)
    }


def to_onnx_node(rnn: nn.RNNBase, layer: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `from_onnx_node`: W, R and B of a layer of a `torch.nn.LSTM` or `GRU`, as `to_torch` gives it.

    A GRU's node needs `linear_before_reset=1`.

    Raises:
        ValueError: proj_size, which ONNX's LSTM has not.
    """
    if rnn.proj_size:
        raise ValueError(f"proj_size: ONNX's LSTM has no projection; expected 0, got {rnn.proj_size}")
    suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: 2 if rnn.bidirectional else 1]

    def stacked(name: str) -> Tensor:
        both = torch.stack([getattr(rnn, name + suffix).detach() for suffix in suffixes])
        by_gate = both.unflatten(1, (-1, rnn.hidden_size))
        return by_gate[:, ONNX_GATES[by_gate.shape[1]]].flatten(1, 2)

    B = torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1) if rnn.bias else None
    return stacked("weight_ih"), stacked("weight_hh"), B
