"""torch's own LSTM and GRU, of oneDNN and cuDNN, and its cells for single tokens, where they are the fastest."""

from collections.abc import Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_rnn_kernels import threads
from hf_rnn_kernels.layout import SequenceLayout
from hf_rnn_kernels.recurrent_scan.reference import state_dtype
from hf_rnn_kernels.transforms import transforming

_CELLS: dict[str, Any] = {"lstm": torch.lstm_cell, "gru": torch.gru_cell}
_LSTM = 2  # a `mode` of torch, those of cuDNN


class Weights(NamedTuple):
    """As torch.nn has them: (gates * D, I), (H, gates * P, P), and biases or None."""

    input_weight: Tensor
    input_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None


def run(
    cell: str, x: Tensor, weights: Weights, states: list[Tensor], layout: SequenceLayout
) -> tuple[Tensor, list[Tensor]] | None:
    """h (B, T, D) and the last states (B, D) of an LSTM or GRU, by autograd's own formulas; None where another backend
    is better, or where torch's cannot: with heads, padding or packing, with weights that are perturbed, quantized or
    sharded, under torch.compile and torch.export, which would unroll it, and under torch.func's transforms, for which
    it has no batching rule.
    """
    if cell not in _CELLS or not _plain(weights, layout):
        return None
    if x.shape[1] == 1:
        return _step(cell, x, weights, states)
    if x.shape[0] == 0 or x.shape[1] == 0 or not (x.is_cuda or (cell == "lstm" and _one_dnn(x, weights))):
        return None  # on a CPU torch's GRU is a loop over time
    if not takes(x, states):
        return None
    zeros = x.new_zeros(x.shape[0], weights.weight.shape[2])
    given = [s.to(x.dtype)[None].contiguous() for s in states] or [zeros[None]] * (2 if cell == "lstm" else 1)
    if layout.reverse and not x.is_cuda:
        return _lstm_backwards(x, weights, given)
    biased = weights.bias is not None
    flat = [weights.input_weight, weights.weight[0], *((weights.input_bias, weights.bias) if biased else ())]
    # has_biases, num_layers, dropout, train, bidirectional, batch_first. cuDNN keeps what its backward needs only if
    # `train`; there is no dropout.
    options = biased, 1, 0.0, torch.is_grad_enabled(), False, True
    # cuDNN reads backwards only beside forwards
    x = x.flip(1) if layout.reverse else x
    if cell == "lstm":
        h, *last = torch.lstm(x, given, flat, *options)
    else:
        h, *last = torch.gru(x, given[0], flat, *options)
    return h.flip(1) if layout.reverse else h, [s[0].to(state_dtype(s)) for s in last]


def _lstm_backwards(x: Tensor, weights: Weights, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """oneDNN's, which `torch.lstm` calls once for each direction."""
    zeros = x.new_zeros(weights.input_weight.shape[0])
    input_bias, bias = (zeros if b is None else b for b in (weights.input_bias, weights.bias))
    h, *last, _ = torch.mkldnn_rnn_layer(
        x.transpose(0, 1).contiguous(), weights.input_weight, weights.weight[0], input_bias, bias,
        hx_=states[0][0], cx_=states[1][0], reverse=True, batch_sizes=[], mode=_LSTM,
        hidden_size=weights.weight.shape[2], num_layers=1, has_biases=weights.bias is not None, bidirectional=False,
        batch_first=False, train=torch.is_grad_enabled(),
    )  # fmt: skip
    return h.transpose(0, 1), last


def cell_step(
    cell: str, x: Tensor, weights: Weights, states: Sequence[Tensor], layout: SequenceLayout
) -> Tensor | None:
    """One token of every row, x (B, 1, I), to h (B, 1, D), over the states; None as `run`."""
    if cell not in _CELLS or not _plain(weights, layout) or (found := _step(cell, x, weights, states)) is None:
        return None
    for old, new in zip(states, found[1], strict=True):
        old.copy_(new)
    return found[0]


def takes(x: Tensor, states: list[Tensor]) -> bool:
    """Whether torch's recurrences keep these states: they take them in their own dtype alone, and a float32 state in
    front of bfloat16 would be rounded."""
    dtype = torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype
    return all(s.dtype == dtype for s in states)


def _step(cell: str, x: Tensor, weights: Weights, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
    """One token, for which torch's sequence functions would pack their weights anew."""
    if not states or _autocasts(x) or not x.dtype == states[0].dtype == weights.weight.dtype:
        return None
    arguments = weights.input_weight, weights.weight[0], weights.input_bias, weights.bias
    new = _CELLS[cell](x[:, 0], states if cell == "lstm" else states[0], *arguments)
    new = list(new) if cell == "lstm" else [new]
    return new[0][:, None], new


def _plain(weights: Weights, layout: SequenceLayout) -> bool:
    simple = layout.mask is None and layout.offsets is None and weights.weight.shape[0] == 1
    dense = all(type(w) in (nn.Parameter, Tensor, NoneType) for w in weights)
    both = (weights.input_bias is None) == (weights.bias is None)
    return simple and dense and both and not torch.compiler.is_compiling() and not transforming()


def _one_dnn(x: Tensor, weights: Weights) -> bool:
    """On a CPU torch's LSTM is oneDNN's in float32, and a loop over time otherwise. Ours is faster where several long
    sequences go through a narrow one (docs/log.md, 2026-11-30)."""
    in_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    narrow = weights.weight.shape[2] <= (128 if torch.is_grad_enabled() else 64)
    long = x.shape[0] >= 8 and x.shape[1] >= 256
    ours = narrow and long and (torch.is_grad_enabled() or x.shape[0] < 64) and threads.available()
    return x.device.type == "cpu" and in_float32 and torch.backends.mkldnn.is_available() and not ours


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the meta device has none
