"""Depthwise causal convolution over time: K multiply-adds, and for large inputs on a CPU one pass in each direction."""

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.causal_conv import op, reference
from hf_rnn_kernels.checks import check_inputs, check_tensors, refuse_forward_mode
from hf_rnn_kernels.layout import ROWS, SequenceLayout, check_layout, check_offsets
from hf_rnn_kernels.perturbed import Perturbed
from hf_rnn_kernels.transforms import tracked


def causal_conv(
    x: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, layout: SequenceLayout = ROWS
) -> tuple[Tensor, Tensor | None]:
    """y_t = bias + sum_j weight[:, j] * x_{t - (K - 1) + j}, each channel for itself.

    Args:
        x: (B, T, D), any floating dtype.
        state: (B, K - 1, D), the inputs before x; zeros by default. None where sequences are packed.
        weight: (D, K).
        bias: (D,).
        layout: which tokens are real and which sequences they make; rows by default. A token that is not real is passed
            over, as if it were not there; nothing reaches from one sequence into another.

    Returns:
        y like x, and the state after the last real token, in float32 (float64 for float64 inputs): `state` itself,
        written to, if `layout.in_place` and no gradient flows; None where sequences are packed.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    check_layout(layout)
    check_inputs({"x": x}, layout.mask, layout.offsets)
    batch, _, channels = x.shape
    history = weight.shape[-1] - 1
    shapes = {"state": (state, (batch, history, channels)), "weight": (weight, (channels, history + 1))}
    check_tensors(shapes | {"bias": (bias, (channels,))}, x, "x")
    if layout.offsets is not None:
        if state is not None:
            raise ValueError("state: expected None where sequences are packed, each of which starts from zeros")
        if x.device.type == "cpu":  # again, for layouts made by hand or under torch.compile
            check_offsets("layout.offsets", layout.offsets, batch * x.shape[1])
    before = x.new_zeros(batch, history, channels) if state is None else state.to(x.dtype)
    if layout.mask is None and layout.offsets is None:
        y, ends = convolve(x, before, weight, bias)
    elif layout.offsets is None:
        y, ends = _with_gaps(x, before, weight, bias, layout)
    else:
        y, _ = _with_gaps(layout.flat(x), before[:1], weight, bias, layout)
        return y.view(x.shape), None
    if layout.in_place and state is not None and not tracked(x, state, weight, bias):
        return y, state.copy_(ends)
    # a copy: a view would keep the whole sequence alive
    return y, ends.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)


def convolve(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.convolve`, and of large inputs on a CPU in one pass."""
    perturbed = isinstance(weight, Perturbed) or isinstance(bias, Perturbed)
    if perturbed or not (threads.worthwhile(x) and weight.dtype == bias.dtype == torch.float32):
        return reference.convolve(x, before, weight, bias)
    refuse_forward_mode(x, before, weight, bias)
    history = before.shape[1]
    ends = torch.cat([before, x[:, max(x.shape[1] - history, 0) :]], 1)
    return op.forward(x, before, weight, bias), ends[:, ends.shape[1] - history :]


def _with_gaps(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    """Real tokens laid out without gaps, K - 1 zeros between packed sequences, convolved, and read back."""
    history, room = before.shape[1], x.shape[1]
    mask = layout.flat_mask()
    real = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
    place = real.cumsum(1) - 1
    if layout.offsets is not None:
        token = torch.arange(room, device=x.device)
        place = place + history * torch.searchsorted(layout.offsets[1:].long(), token, right=True)
        room = room + history * (layout.offsets.shape[0] - 1)
    index = _expand(place.clamp(min=0), x)
    laid = x.new_zeros(x.shape[0], room, x.shape[2])
    laid = laid.scatter_add(1, index, x * real[..., None])  # padding adds zero
    y = convolve(laid, before, weight, bias)[0].gather(1, index)
    last = real.sum(1, keepdim=True) + torch.arange(history, device=x.device)
    return y, torch.cat([before, laid], 1).gather(1, _expand(last, x))


def _expand(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[2])
