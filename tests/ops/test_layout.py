"""One layout for all ops: sequences that run across rows, states written in place, arguments checked once."""

import itertools
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from accelerate.utils import send_to_device
from conftest import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rnn_kernels import (
    SequenceLayout,
    causal_conv,
    gru_scan,
    linear_scan,
    lstm_scan,
    min_gru_scan,
    min_lstm_scan,
    mlstm_scan,
    slstm_scan,
)


class Case(NamedTuple):
    """An op as a function of inputs (B, T, ...), a list of states (N, ...) and a layout, to h and a list of states."""

    run: object
    inputs: list  # of trailing shapes
    states: list


def listed(result):
    h, last = result
    return h, [last] if isinstance(last, torch.Tensor) else list(last)


W4, W3 = torch.randn(2, 12, 3) / 2, torch.randn(2, 9, 3) / 2
CASES = {
    "linear": Case(lambda x, s, y: linear_scan(x[0].sigmoid(), x[1], *s, y), [(6,), (6,)], [(6,)]),
    "min_gru": Case(lambda x, s, y: min_gru_scan(*x, *s, y), [(6,), (6,)], [(6,)]),
    "min_lstm": Case(lambda x, s, y: min_lstm_scan(*x, *s, y), [(6,)] * 3, [(6,)]),
    "lstm": Case(lambda x, s, y: lstm_scan(*x, W4, None, *s, y), [(24,)], [(6,)] * 2),
    "lstm of torch": Case(
        lambda x, s, y: lstm_scan(*x, W4[:1], None, *s, y, input_weight=torch.ones(12, 5) / 9), [(5,)], [(3,)] * 2
    ),
    "gru": Case(lambda x, s, y: gru_scan(*x, W3, None, *s, y), [(18,)], [(6,)]),
    "gru of torch": Case(
        lambda x, s, y: gru_scan(*x, W3[:1], None, *s, y, input_weight=torch.ones(9, 5) / 9), [(5,)], [(3,)]
    ),
    "slstm": Case(lambda x, s, y: slstm_scan(*x, W4, None, *s, y), [(24,)], [(6,)] * 4),
    "mlstm": Case(
        lambda x, s, y: mlstm_scan(*x, *s, y), [(2, 3), (2, 3), (2, 5), (2,), (2,)], [(2, 3, 5), (2, 3), (2,)]
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]


def inputs(case, batch, time):
    return [torch.randn(batch, time, *shape) for shape in case.inputs]


def states(case, count):
    return [torch.rand(count, *shape) + 0.1 for shape in case.states]


def test_sequences_run_across_rows(case):
    """Offsets count the tokens of all rows, one after another."""
    x, offsets = inputs(case, 3, 5), torch.tensor([0, 4, 4, 11, 15])
    mask = torch.rand(3, 5) > 0.3
    first = states(case, 4)
    h, last = listed(case.run(x, first, SequenceLayout.of(3, 5, mask, offsets)))
    flat = [y.flatten(0, 1)[None] for y in x]
    expected, expected_last = listed(case.run(flat, first, SequenceLayout.of(1, 15, mask.view(1, 15), offsets)))
    assert h.shape[:2] == (3, 5) and torch.equal(h.flatten(0, 1), expected[0])
    assert all(torch.equal(a, b) for a, b in zip(last, expected_last, strict=True))


def backwards(x, bounds):
    """Each sequence's tokens in the opposite order, (B, T, ...)."""
    flat, bounds = x.flatten(0, 1), bounds.tolist()
    return torch.cat([flat[a:b].flip(0) for a, b in itertools.pairwise(bounds)]).view(x.shape)


@pytest.mark.parametrize("name", [*CASES, "conv", "long conv"])
@pytest.mark.parametrize("kind", ["rows", "padded", "packed"])
def test_reverse_is_the_reversed_sequence(name, kind):
    """Outputs, last states and gradients, of whole rows, rows with padding anywhere and sequences across rows."""
    torch.manual_seed(0)
    batch, time = 3, 4000 if name == "long conv" else 7  # compiled loops
    weight, bias = torch.randn(6, 3), torch.randn(6)
    conv = Case(lambda x, s, y: causal_conv(*x, *s, weight, bias, y), [(6,)], [(2, 6)])
    case = CASES.get(name, conv)
    mask = None if kind == "rows" else torch.rand(batch, time) > 0.3
    offsets = torch.tensor([0, 4, 4, 2 * time + 1, 3 * time]) if kind == "packed" else None
    bounds = torch.arange(batch + 1) * time if offsets is None else offsets
    x, first = inputs(case, batch, time), states(case, len(bounds) - 1)
    leaves = [y.requires_grad_() for y in (*x, *first)]
    h, last = listed(case.run(x, first, SequenceLayout(mask, offsets, reverse=True)))
    turned = SequenceLayout(None if mask is None else backwards(mask, bounds), offsets)
    expected, expected_last = listed(case.run([backwards(y, bounds) for y in x], first, turned))
    expected = backwards(expected, bounds)
    real = slice(None) if mask is None else mask
    grads = torch.randn_like(h[real])
    ours = torch.autograd.grad([h[real], *last], leaves, [grads, *last])
    theirs = torch.autograd.grad([expected[real], *expected_last], leaves, [grads, *last])
    for a, b in [(h[real], expected[real]), *zip(last, expected_last, strict=True), *zip(ours, theirs, strict=True)]:
        assert relative_error(a, b) <= 1e-6


def test_a_convolution_across_rows():
    x, weight, bias = torch.randn(3, 5, 4), torch.randn(4, 3), torch.randn(4)
    layout = SequenceLayout.of(3, 5, torch.rand(3, 5) > 0.3, torch.tensor([0, 4, 11, 15]))
    state = torch.randn(3, 2, 4)
    for before in (None, state):
        y, last = causal_conv(x, before, weight, bias, layout)
        for n, (start, stop) in enumerate([(0, 4), (4, 11), (11, 15)]):
            row, real = x.view(1, 15, 4)[:, start:stop], layout.mask.view(1, 15)[:, start:stop]
            own = None if before is None else before[n : n + 1]
            expected, end = causal_conv(row, own, weight, bias, SequenceLayout(real))
            torch.testing.assert_close(y.view(1, 15, 4)[:, start:stop], expected)
            torch.testing.assert_close(last[n : n + 1], end)
            assert not expected[~real].any(), "padding gives zeros"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("time", [1, 6])
def test_states_are_written_in_place(case, time, padded):
    """Under no_grad and only if the layout says so; the values are those of new states."""
    x, first = inputs(case, 2, time), states(case, 2)
    mask = torch.tensor([[True] * time, [False] * time]) if padded else None
    expected, expected_last = listed(case.run(x, first, SequenceLayout(mask)))
    kept = [s.clone() for s in first]
    with torch.no_grad():
        h, last = listed(case.run(x, kept, SequenceLayout(mask, in_place=True)))
    assert all(a is b for a, b in zip(last, kept, strict=True))
    real = slice(None) if mask is None else mask
    for a, b in [(h[real], expected[real]), *zip(last, expected_last, strict=True)]:
        assert relative_error(a, b) < 1e-6
    if padded:
        assert all(torch.equal(a[1], b[1]) for a, b in zip(last, first, strict=True))
    x = [y.requires_grad_() for y in x]
    before = [s.clone() for s in first]
    _, last = listed(case.run(x, first, SequenceLayout(mask, in_place=True)))
    assert not any(a is b for a, b in zip(last, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))


def test_a_convolutions_state_is_written_in_place():
    x, state, weight, bias = torch.randn(2, 1, 4), torch.randn(2, 2, 4), torch.randn(4, 3), torch.randn(4)
    y, expected = causal_conv(x, state, weight, bias)
    again, last = causal_conv(x, state, weight, bias, SequenceLayout(in_place=True))
    assert last is state and torch.equal(again, y) and torch.equal(state, expected)


class Sizes(TorchDispatchMode):
    """The largest tensor that torch makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        given = {x.data_ptr() for x in [*args, *(kwargs or {}).values()] if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.data_ptr() not in given:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("keys", [8, 256])
def test_the_matrix_memory_has_no_copy(keys):
    """In torch's calls for a small memory as in the loop for a large one."""
    x = [torch.randn(1, 1, 2, keys), torch.randn(1, 1, 2, keys), torch.randn(1, 1, 2, keys), *torch.randn(2, 1, 1, 2)]
    C, n, m = torch.randn(1, 2, keys, keys), torch.rand(1, 2, keys), torch.zeros(1, 2)
    with torch.no_grad(), Sizes() as sizes:
        mlstm_scan(*x, C, n, m, SequenceLayout(in_place=True))
    assert sizes.largest < C.numel() // 2


def test_states_that_no_kernel_can_take_are_written_all_the_same(case):
    """Of another dtype, with gaps, and some of them missing, whose zeros are nobody's buffer."""
    x, first = inputs(case, 2, 1), states(case, 2)
    _, expected = listed(case.run(x, first, SequenceLayout()))
    odd = [torch.stack([s, s], -1)[..., 0] if n % 2 else s.double() for n, s in enumerate(first)]
    with torch.no_grad():
        _, last = listed(case.run(x, odd, SequenceLayout(in_place=True)))
    assert all(a is b and relative_error(a, c) < 1e-6 for a, b, c in zip(last, odd, expected, strict=True))
    if len(first) > 1:
        some = [first[0], *[None] * (len(first) - 1)]
        _, expected = listed(case.run(x, some, SequenceLayout()))
        with torch.no_grad():
            _, last = listed(case.run(x, some, SequenceLayout(in_place=True)))
        assert all(torch.equal(a, b) for a, b in zip(last, expected, strict=True)) and last[0] is not first[0]


def test_what_padding_holds_reaches_no_state(case):
    x, first = inputs(case, 2, 1), states(case, 2)
    for y in x:
        y[0] = torch.nan
    with torch.no_grad():
        _, last = listed(case.run(x, [s.clone() for s in first], SequenceLayout(torch.tensor([[False], [True]]))))
    assert all(torch.equal(a[0], b[0]) and a.isfinite().all() for a, b in zip(last, first, strict=True))


def test_moving_a_module_s_arguments_moves_the_layout():
    layout = send_to_device(SequenceLayout(torch.ones(2, 3) > 0, torch.tensor([0, 6])), "meta")
    assert type(layout) is SequenceLayout and layout.mask.is_meta and layout.offsets.is_meta and not layout.in_place


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((2, 3, torch.ones(3, 2)), ValueError, r"mask: expected shape \(B, T\) = \(2, 3\)"),
        ((1, 3, torch.tensor([[0.0, -1e9, -1e9]])), ValueError, "mask: expected zeros at padding and ones"),
        ((2, 3, None, torch.tensor([0.0, 6.0])), TypeError, "cu_seqlens: expected int32"),
        ((2, 3, None, torch.tensor([[0, 6]])), ValueError, r"cu_seqlens: expected shape \(N \+ 1,\)"),
        ((2, 3, None, torch.tensor([0, 5])), ValueError, "cu_seqlens: expected offsets that rise from 0 to 6"),
        ((2, 3, None, torch.tensor([0, 4, 2, 6])), ValueError, "cu_seqlens: expected offsets that rise"),
    ],
)
def test_a_wrong_layout(arguments, error, message):
    with pytest.raises(error, match=message):
        SequenceLayout.of(*arguments)


@pytest.mark.parametrize(
    "call",
    [
        lambda y: min_gru_scan(torch.ones(2, 3, 4), torch.ones(2, 3, 4), None, y),
        lambda y: lstm_scan(torch.ones(2, 3, 24), W4, layout=y),
        lambda y: mlstm_scan(*torch.ones(3, 2, 3, 1, 2), *torch.ones(2, 2, 3, 1), layout=y),
        lambda y: causal_conv(torch.ones(2, 3, 4), None, torch.ones(4, 3), torch.ones(4), y),
    ],
)
def test_what_is_no_layout(call):
    with pytest.raises(TypeError, match=r"layout: expected a SequenceLayout.*got a Tensor"):
        call(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"layout.mask: expected bool"):
        call(SequenceLayout(torch.ones(2, 3)))


SLOW = """
import sys, warnings
sys.modules["numba"] = None
import torch
from hf_rnn_kernels import lstm_scan, min_gru_scan
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        min_gru_scan(torch.randn(1, 4, 2), torch.randn(1, 4, 2))
        lstm_scan(torch.randn(1, 4, 8), torch.randn(1, 8, 2))
        min_gru_scan(*torch.randn(2, 1, 4, 2).double())
messages = [str(w.message) for w in seen if issubclass(w.category, RuntimeWarning)]
assert len(messages) == 1 and "numba is missing" in messages[0] and "pip install 'hf-rnn[cpu]'" in messages[0], messages
"""


def test_slow_loops_are_told_of_once():
    subprocess.run([sys.executable, "-c", SLOW], check=True, timeout=120)
