"""Depthwise causal convolution over time: K multiply-adds, and for large inputs on a CPU one pass in each direction."""

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.causal_conv import op, reference
from hf_rnn_kernels.checks import check_inputs, check_tensors, refuse_forward_mode
from hf_rnn_kernels.layout import ROWS, SequenceLayout, check_layout, check_offsets
from hf_rnn_kernels.perturbed import Perturbed
from hf_rnn_kernels.stepping import record
from hf_rnn_kernels.transforms import tracked


def causal_conv(
    x: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor, layout: SequenceLayout = ROWS
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[:, j] * x_{t - (K - 1) + j}, each channel for itself.

    Args:
        x: (B, T, D), any floating dtype.
        state: (N, K - 1, D), the inputs before each sequence, N = B where rows are; zeros by default.
        weight: (D, K).
        bias: (D,).
        layout: which tokens are real and which sequences they make; rows by default. A token that is not real is passed
            over, as if it were not there, and gives zeros; nothing reaches from one sequence into another. Read in
            `reverse`, y_t is of what follows x_t, and states are in the order of reading.

    Returns:
        y like x, and the state after the last real token, in float32 (float64 for float64 inputs): `state` itself,
        written to, if `layout.in_place` and no gradient flows.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    check_layout(layout)
    if layout.recorded:

        def read_piece(layout, inputs, states):
            y, last = causal_conv(inputs[0], states[0], weight, bias, layout)
            return y, (last,)

        y, (ends,) = record(layout, [x], (state,), read_piece)
        return y, ends
    check_inputs({"x": x}, layout.mask, layout.offsets)
    batch, _, channels = x.shape
    history, sequences = weight.shape[-1] - 1, layout.sequences(batch)
    shapes = {"state": (state, (sequences, history, channels)), "weight": (weight, (channels, history + 1))}
    check_tensors(shapes | {"bias": (bias, (channels,))}, x, "x")
    if layout.offsets is not None and x.device.type == "cpu":  # again, for layouts made by hand or under torch.compile
        check_offsets("layout.offsets", layout.offsets, batch * x.shape[1])
    before = x.new_zeros(sequences, history, channels) if state is None else state.to(x.dtype)
    if layout.mask is None and layout.offsets is None:
        y, ends = convolve(x, before, weight, bias, layout.reverse)
    else:
        y, ends = _with_gaps(layout.flat(x), before, weight, bias, layout)
        y = y.view(x.shape)
    if layout.in_place and state is not None and not tracked(x, state, weight, bias):
        return y, state.copy_(ends)
    # a copy: a view would keep the whole sequence alive
    return y, ends.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)


def convolve(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """`reference.convolve`, and of large inputs on a CPU in one pass."""
    perturbed = isinstance(weight, Perturbed) or isinstance(bias, Perturbed)
    if perturbed or not (threads.worthwhile(x) and weight.dtype == bias.dtype == torch.float32):
        return reference.convolve(x, before, weight, bias, reverse)
    refuse_forward_mode(x, before, weight, bias)
    history = before.shape[1]
    end = x[:, :history].flip(1) if reverse else x[:, max(x.shape[1] - history, 0) :]
    ends = torch.cat([before, end], 1)
    return op.forward(x, before, weight, bias, reverse), ends[:, ends.shape[1] - history :]


def _with_gaps(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    """Real tokens laid out without gaps as they are read, behind what is before them, convolved, and read back."""
    history, room = before.shape[1], x.shape[1]
    mask = layout.flat_mask()
    real = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
    place = real.cumsum(1) - 1
    within = torch.arange(history, device=x.device)
    last = real.sum(1, keepdim=True) + within
    if layout.reverse and layout.offsets is None:
        place = real.sum(1, keepdim=True) - 1 - place
    if layout.offsets is not None:  # each sequence behind its own, in one row
        bounds, token = layout.offsets.long(), torch.arange(room, device=x.device)
        sequence = torch.searchsorted(bounds[1:], token, right=True)
        count = torch.nn.functional.pad(real.cumsum(1), (1, 0))[0, bounds]  # real tokens up to each bound
        if layout.reverse:
            place = count[sequence] + count[sequence + 1] - 1 - place
        place = place + history * sequence
        shift = history * torch.arange(len(bounds), device=x.device)
        starts = (count + shift)[1:-1, None] + within - history
        last = (count[1:] + shift[:-1])[:, None] + within
        room = room + history * (len(bounds) - 2)
    index = _expand(place.clamp(min=0), x)
    laid = x.new_zeros(x.shape[0], room, x.shape[2])
    laid = laid.scatter_add(1, index, x * real[..., None])  # padding adds zero
    if layout.offsets is not None:
        laid = laid.scatter_add(1, _expand(starts.reshape(1, -1), x), before[1:].reshape(1, -1, x.shape[2]))
        before, last = before[:1], last.reshape(1, -1)
    y = convolve(laid, before, weight, bias)[0].gather(1, index) * real[..., None]
    ends = torch.cat([before, laid], 1).gather(1, _expand(last, x))
    return y, ends if layout.offsets is None else ends.view(-1, history, x.shape[2])


def _expand(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[2])
