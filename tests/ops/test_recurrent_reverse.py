"""lstm_scan, gru_scan and slstm_scan from each sequence's end to its start."""

import copy
import itertools

import hypothesis.strategies as st
import pytest
import torch
from conftest import layout_of
from hypothesis import given, settings
from ops.test_recurrent_scan import CELLS, SCANS, check, cotangents, make, run
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hf_rnn_kernels import SequenceLayout
from hf_rnn_kernels.layout import ROWS
from hf_rnn_kernels.recurrent_scan import library, reference


def from_the_end(t, cu_seqlens=None):
    """(B, T, ...) with each sequence the other way round."""
    bounds = [0, t.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    return torch.cat([t[:, start:stop].flip(1) for start, stop in itertools.pairwise(bounds)], 1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0), (torch.bfloat16, 0), (torch.float64, 1e-12)])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_reversed_is_forwards_over_what_is_flipped(cell, dtype, tolerance, data):
    """Bit for bit where the loops are ours, with every gradient, padding, empty sequences and initial states."""
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any))
    packed, heads, size = data.draw(st.booleans()), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)]) if packed else None
    shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    leaves = [t.to(dtype) for t in make(cell, *shape, heads, size, len(lengths))]
    mask = torch.rand(shape) < 0.7 if data.draw(st.booleans()) else None
    grad, grad_last = cotangents(leaves, heads * size)
    grad_last = grad_last.to(reference.state_dtype(leaves[0]))
    actual = run(cell, leaves, grad, grad_last, mask, cu_seqlens, reverse=True)
    flipped = [from_the_end(t, cu_seqlens) for t in (leaves[0], grad, *([] if mask is None else [mask]))]
    expected = run(cell, [flipped[0], *leaves[1:]], flipped[1], grad_last, *(flipped[2:] or [None]), cu_seqlens)
    expected[0], expected[2] = (from_the_end(t, cu_seqlens) for t in (expected[0], expected[2]))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cell", CELLS)
def test_a_long_sequence_reversed(cell):
    """Several blocks of steps, beside shorter sequences."""
    cu_seqlens = torch.tensor([0, 3, 150, 157, 400])
    leaves = make(cell, 1, 400, 2, 7, 4)
    grad, grad_last = cotangents(leaves, 14)
    x, weight, bias, *initial = [t.double() for t in leaves]
    arguments = (cell, x, weight, bias, initial, None, cu_seqlens)
    h, others, last = reference.scan(*arguments, True, reverse=True)
    grads = reference.scan_backward(*arguments, h, others, grad.double(), grad_last.double(), True)
    actual = run(cell, leaves, grad, grad_last, None, cu_seqlens, reverse=True)
    check(actual, [h, last, *grads[:3], *grads[3]])


@pytest.mark.parametrize("cell", CELLS)
def test_reversed_under_transforms_and_the_compiler(cell):
    """And in place. Both ways are compiled as two calls of one operator."""
    x, weight, bias, *initial = make(cell, 2, 6, 2, 3)
    scan = SCANS[cell]
    loss = lambda x: scan(x, weight, bias, *initial, backwards)[0].pow(2).sum()  # noqa: E731
    backwards = SequenceLayout(reverse=True)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(x), expected)
    both = lambda x: [scan(x, weight, bias, *initial, ROWS._replace(reverse=r))[0] for r in (False, True)]  # noqa: E731
    for a, b in zip(torch.compile(both, backend="aot_eager", fullgraph=True)(x), both(x), strict=True):
        assert torch.equal(a, b)
    buffers = [s.clone() for s in initial]
    h, last = scan(x, weight, bias, *buffers, SequenceLayout(in_place=True, reverse=True))
    assert (last if cell == "gru" else last[0]) is buffers[0] and torch.equal(h[:, 0], buffers[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("form", ["dense", "our op", "masked", "packed"])
def test_both_ways_are_torchs_bidirectional(cell, form, bias, monkeypatch):
    if form == "our op":
        monkeypatch.setattr(library, "run", lambda *_: None)
    torch.manual_seed(0)
    lengths = torch.tensor([7, 21, 1, 20] if form in ("masked", "packed") else [21] * 4)
    mask = torch.arange(21) < lengths[:, None]
    rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](5, 11, batch_first=True, bidirectional=True, bias=bias)
    count = reference.CELLS[cell].states
    x, initial, grad = torch.randn(4, 21, 5), torch.randn(count, 2, 4, 11), torch.randn(4, 21, 22) * mask[..., None]
    grad_last = torch.randn(count, 2, 4, 11)

    double = copy.deepcopy(rnn).double()
    leaves = [x.double().requires_grad_(), initial.double().requires_grad_()]
    packed = pack_padded_sequence(leaves[0], lengths, batch_first=True, enforce_sorted=False)
    h, last = double(packed, leaves[1].unbind(0) if cell == "lstm" else leaves[1][0])
    expected = [pad_packed_sequence(h, batch_first=True)[0], torch.stack(last) if cell == "lstm" else last[None]]
    inputs = [*leaves, *double.parameters()]
    expected += torch.autograd.grad(expected, inputs, [grad.double(), grad_last.double()])

    leaves = [x.clone().requires_grad_(), initial.clone().requires_grad_()]
    layout = SequenceLayout(mask if form == "masked" else None)
    read = leaves[0]
    if form == "packed":
        read, layout = (
            read[mask][None],
            layout_of(read[mask][None], None, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))),
        )
    weights, outputs, lasts = list(rnn.parameters()), [], []
    for way in range(2):
        own = weights[way * len(weights) // 2 :]
        biases = own[2:4] if bias else [None, None]
        h, last = SCANS[cell](
            read, own[1][None], biases[1], *leaves[1][:, way], layout._replace(reverse=bool(way)),
            input_weight=own[0], input_bias=biases[0],
        )  # fmt: skip
        outputs.append(h)
        lasts.append(torch.stack(last) if cell == "lstm" else last[None])
    h = torch.cat(outputs, 2)
    h = torch.zeros(4, 21, 22).masked_scatter(mask[..., None], h) if form == "packed" else h * mask[..., None]
    actual = [h, torch.stack(lasts, 1)]
    actual += torch.autograd.grad(actual, [*leaves, *weights], [grad, grad_last])
    check(actual, expected)
