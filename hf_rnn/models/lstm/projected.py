"""LSTMs whose state is projected (arXiv 1402.1128), by torch's own."""

import torch
from torch import Tensor

from hf_rnn_kernels.layout import SequenceLayout
from hf_rnn_kernels.stepping import record


def projected_lstm(
    x: Tensor, weights: list[Tensor], h0: Tensor | None, c0: Tensor | None, layout: SequenceLayout
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """h_t = W_p (sigmoid(o) tanh(c_t)), gates and c as in an LSTM, of h_{t-1}.

    Args:
        x: (B, T, D).
        weights: as `torch.nn.LSTM` has them for one layer: of the input (4 C, D), of h (4 C, P), their biases or none,
            W_p (P, C).
        h0, c0: the states before each sequence, (N, P) and (N, C); zeros by default.

    Returns:
        h (B, T, P), zeros at padding, and the last states in float32 (float64 for float64 inputs), in which all is
        computed; where `layout.in_place`, h0 and c0 themselves.
    """
    if layout.recorded:

        def read_piece(layout, inputs, states):
            return projected_lstm(inputs[0], weights, states[0], states[1], layout)

        y, (h, c) = record(layout, [x], (h0, c0), read_piece)
        return y, (h, c)
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    first = [
        x.new_zeros(layout.sequences(x.shape[0]), size, dtype=state_dtype) if s is None else s.to(state_dtype)
        for s, size in zip((h0, c0), weights[-1].shape, strict=True)
    ]
    weights = [w.to(state_dtype) for w in weights]
    whole_rows = layout.mask is None and layout.offsets is None and x.shape[0] and x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        y, last = (_of_rows if whole_rows else _of_places)(x.to(state_dtype), weights, first, layout)
    if layout.in_place:
        last = [s.copy_(new) for s, new in zip(first, last, strict=True)]
    return y.to(x.dtype), (last[0], last[1])


def _of_rows(
    x: Tensor, weights: list[Tensor], first: list[Tensor], layout: SequenceLayout
) -> tuple[Tensor, list[Tensor]]:
    """Rows of real tokens."""
    x = x.flip(1) if layout.reverse else x
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    options = len(weights) > 3, 1, 0.0, True, False, True
    y, *last = torch.lstm(x, [s[None].contiguous() for s in first], weights, *options)
    return y.flip(1) if layout.reverse else y, [s[0] for s in last]


def _of_places(
    x: Tensor, weights: list[Tensor], first: list[Tensor], layout: SequenceLayout
) -> tuple[Tensor, list[Tensor]]:
    """Tokens of any layout, gathered into a packed sequence of torch's."""
    token, sequence, place, lengths = _places_as_read(layout, x.shape[0], x.shape[1], x.device)
    some = lengths.nonzero().squeeze(1)  # torch's takes no empty sequences
    y = x.new_zeros(*x.shape[:2], weights[-1].shape[0])
    if not len(some):
        return y, first
    rows = x.new_zeros(len(lengths), int(lengths.max()), x.shape[2])
    rows = rows.index_put((sequence, place), x.flatten(0, 1)[token])
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        rows[some], lengths[some].cpu(), batch_first=True, enforce_sorted=False
    )
    order, back = packed.sorted_indices, packed.unsorted_indices
    before = [s[some][order][None] for s in first]
    data, h, c = torch.lstm(packed.data, packed.batch_sizes, before, weights, len(weights) > 3, 1, 0.0, True, False)
    output = torch.nn.utils.rnn.PackedSequence(data, packed.batch_sizes, order, back)
    of_rows, _ = torch.nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
    which = torch.zeros_like(lengths).index_put((some,), torch.arange(len(some), device=x.device))
    y = y.flatten(0, 1).index_put((token,), of_rows[which[sequence], place]).view_as(y)
    return y, [s.index_put((some,), new[0][back]) for s, new in zip(first, (h, c), strict=True)]


def _places_as_read(
    layout: SequenceLayout, batch: int, time: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each real token its index among all B * T, its sequence, and its place there as it is read; and the number of
    real tokens in each of the N sequences."""
    offsets = torch.arange(batch + 1, device=device) * time if layout.offsets is None else layout.offsets.long()
    real = torch.ones(batch * time, dtype=torch.bool, device=device) if layout.mask is None else layout.mask.flatten()
    token = real.nonzero().squeeze(1)
    sequence = torch.searchsorted(offsets[1:], token, right=True)
    lengths = torch.bincount(sequence, minlength=len(offsets) - 1)
    place = torch.arange(len(token), device=device) - (lengths.cumsum(0) - lengths)[sequence]
    return token, sequence, lengths[sequence] - 1 - place if layout.reverse else place, lengths
