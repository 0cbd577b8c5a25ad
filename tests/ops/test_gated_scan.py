"""The ops on a CPU, against the float64 recurrence, under raw losses."""

import itertools
import os
import subprocess
import sys
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import layout_of, relative_error
from hypothesis import given, settings

from hf_rnn_kernels import SequenceLayout, linear_scan, min_gru_scan, min_lstm_scan
from hf_rnn_kernels.gated_scan import op, reference

GATES = ["linear", "min_gru", "min_gru+g", "min_lstm", "min_lstm+g", "min_lstm+normalize", "min_lstm+g+normalize"]


def make_inputs(gates, batch, time, channels, bias=0.0, sequences=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, time, channels, generator=generator) for _ in range(3 if "lstm" in gates else 2)]
    inputs[0] += bias
    if gates == "linear":
        inputs[0] = torch.sigmoid(-inputs[0])
    h0 = torch.randn(sequences or batch, channels, generator=generator)
    return [x.to(dtype) for x in inputs], h0


def sequential_float64(gates, inputs, h0, grad, grad_last):
    """Outputs and gradients by the recurrence in numpy, step by step, in float64; written apart from the package."""
    arrays = [x.double().numpy() for x in inputs]
    sigmoid = lambda x: np.where(x >= 0, 1 / (1 + np.exp(-abs(x))), np.exp(-abs(x)) / (1 + np.exp(-abs(x))))  # noqa: E731
    if gates == "linear":
        keep, add = arrays
    else:
        x = arrays[-1]
        candidate = np.where(x >= 0, x + 0.5, sigmoid(x)) if "+g" in gates else x
        slope = np.where(x >= 0, 1.0, sigmoid(x) * sigmoid(-x)) if "+g" in gates else np.ones_like(x)
        if "gru" in gates:
            keep, share = sigmoid(-arrays[0]), sigmoid(arrays[0])
        else:
            keep, share = sigmoid(arrays[0]), sigmoid(arrays[1])
            if "normalize" in gates:
                keep, share = keep / (keep + share), share / (keep + share)
        add = share * candidate
    before = np.empty_like(add)
    h, state = np.empty_like(add), h0.double().numpy()
    for t in range(add.shape[1]):
        before[:, t] = state
        h[:, t] = state = keep[:, t] * state + add[:, t]
    dh, carry = np.empty_like(add), grad_last.double().numpy()
    grad = grad.double().numpy()
    for t in reversed(range(add.shape[1])):
        dh[:, t] = grad[:, t] + carry
        carry = keep[:, t] * dh[:, t]
    if gates == "linear":
        grads = [dh * before, dh]
    elif "gru" in gates:
        grads = [dh * (candidate - before) * share * keep, dh * share * slope]
    elif "normalize" in gates:
        ratio = dh * (candidate - before) * share * keep
        grads = [-ratio * sigmoid(-arrays[0]), ratio * sigmoid(-arrays[1]), dh * share * slope]
    else:
        f, i = keep, share
        grads = [dh * before * f * (1 - f), dh * candidate * i * (1 - i), dh * share * slope]
    return [torch.from_numpy(a) for a in (h, state, *grads, carry)]


def run(gates, inputs, h0, grad, grad_last, **arguments):
    leaves = [x.clone().requires_grad_() for x in [*inputs, h0]]
    mask, cu_seqlens = arguments.get("mask"), arguments.get("cu_seqlens")
    h, last = op.scan(gates, leaves[:-1], leaves[-1], mask, cu_seqlens, False)
    grads = torch.autograd.grad([h, last], leaves, [grad, grad_last])
    return [h.detach(), last.detach(), *grads]


@pytest.mark.parametrize("bias", [-8.0, 0.0, 8.0])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("time", [1, 2, 37, 1000, 65536])
def test_against_float64(gates, bias, time):
    channels = 3 if time == 65536 else 19
    inputs, h0 = make_inputs(gates, 2, time, channels, bias)
    grad, grad_last = torch.randn(2, time, channels), torch.randn(2, channels)
    expected = sequential_float64(gates, inputs, h0, grad, grad_last)
    for i, (x, reference_x) in enumerate(zip(run(gates, inputs, h0, grad, grad_last), expected, strict=True)):
        assert relative_error(x, reference_x) <= (1e-6 if i < 2 else 1e-5), i


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(gates, dtype):
    inputs, h0 = make_inputs(gates, 2, 300, 21, -2.0, dtype=dtype)
    grad, grad_last = torch.randn(2, 300, 21).to(dtype), torch.randn(2, 21)
    outputs = run(gates, inputs, h0, grad, grad_last)
    assert outputs[0].dtype == dtype and outputs[1].dtype == torch.float32
    for x, reference_x in zip(outputs, sequential_float64(gates, inputs, h0, grad, grad_last), strict=True):
        assert relative_error(x, reference_x) <= 1e-2


@pytest.mark.parametrize("gates", GATES)
def test_the_plain_torch_path(gates):
    """What float64 runs on, and every dtype where no compiled backend is installed."""
    inputs, h0 = make_inputs(gates, 2, 23, 5)
    grad, grad_last = torch.randn(2, 23, 5), torch.randn(2, 5)
    expected = sequential_float64(gates, inputs, h0, grad, grad_last)
    double = run(gates, [x.double() for x in inputs], h0.double(), grad.double(), grad_last.double())
    h, last = reference.scan(gates, inputs, h0)
    grads, grad_h0 = reference.scan_backward(gates, inputs, h0, None, None, h, grad, grad_last)
    for x, reference_x in zip(double, expected, strict=True):
        assert relative_error(x, reference_x) <= 1e-13
    for x, reference_x in zip([h, last, *grads.unbind(2), grad_h0], expected, strict=True):
        assert relative_error(x, reference_x) <= 1e-6


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gates", GATES)
def test_gradcheck(gates, reverse):
    inputs, h0 = make_inputs(gates, 2, 5, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    leaves = [x.requires_grad_() for x in [*inputs, h0.double()]]
    assert torch.autograd.gradcheck(lambda *x: op.scan(gates, list(x[:-1]), x[-1], mask, None, reverse), leaves)


@pytest.mark.parametrize("gates", GATES)
def test_registration(gates):
    inputs, h0 = make_inputs(gates, 2, 7, 3)
    inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(
        op.scan.operator, (gates, inputs, h0.requires_grad_(), torch.ones(2, 7, dtype=torch.bool), None, True)
    )
    torch.library.opcheck(op.scan.operator, (gates, inputs, None, None, None, False))
    packed = [x[:1] for x in inputs]
    torch.library.opcheck(op.scan.operator, (gates, packed, None, None, torch.tensor([0, 3, 7]), False))


@pytest.mark.parametrize("gates", GATES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_masked_and_packed_against_one_by_one(gates, data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
    total, channels = sum(lengths), data.draw(st.integers(1, 40))
    inputs, h0 = make_inputs(gates, 1, total, channels, data.draw(st.floats(-4, 4)), sequences=len(lengths))
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=total, max_size=total))])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    grad, grad_last = torch.randn(1, total, channels), torch.randn(len(lengths), channels)
    h, last, *grads = run(gates, inputs, h0, grad, grad_last, mask=mask, cu_seqlens=cu_seqlens)
    for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        real = torch.arange(start, stop)[mask[0, start:stop]]
        if len(real) == 0:
            assert torch.equal(last[n], h0[n])
            continue
        # Padding's output is the state: its gradient belongs to the real token before it (or to h0).
        alone = grad[:, real].clone()
        to_h0 = torch.zeros(channels)
        for t in set(range(start, stop)) - set(real.tolist()):
            earlier = (real < t).sum().item()
            if earlier:
                alone[0, earlier - 1] += grad[0, t]
            else:
                to_h0 += grad[0, t]
        expected = run(gates, [x[:, real] for x in inputs], h0[n : n + 1], alone, grad_last[n : n + 1])
        torch.testing.assert_close(h[:, real], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last[n : n + 1], expected[1], rtol=1e-5, atol=1e-6)
        for x, y in zip(grads[:-1], expected[2:-1], strict=True):
            torch.testing.assert_close(x[:, real], y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads[-1][n], expected[-1][0] + to_h0, rtol=1e-4, atol=1e-5)
    for x in grads[:-1]:
        assert not x[0, ~mask[0]].any()


def test_padding_changes_nothing_bit_for_bit():
    inputs, h0 = make_inputs("min_gru+g", 2, 9, 33)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0, 0], [1] * 9]).bool()
    h, last = min_gru_scan(*inputs, h0, SequenceLayout(mask))
    alone, alone_last = min_gru_scan(*(x[:1, mask[0]] for x in inputs), h0[:1])
    assert torch.equal(h[:1, mask[0]], alone) and torch.equal(last[:1], alone_last)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e38])
def test_finite_for_finite_input(gates, scale):
    values = torch.tensor([-3.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 3.0]) * scale
    count = 3 if "lstm" in gates else 2
    inputs = [x.reshape(1, -1, 1).contiguous() for x in torch.meshgrid(*[values] * count, indexing="ij")]
    if gates == "linear":
        inputs[0] = inputs[0].clamp(-1, 1)  # the product of finite coefficients overflows rightly
        inputs[1] = inputs[1] / inputs[1].numel()
    if gates.startswith("min_lstm") and "normalize" not in gates:
        inputs[-1] = inputs[-1] / inputs[-1].numel()  # f + i > 1: a sum of large candidates overflows rightly
    h0 = values[:1, None]
    outputs = run(gates, inputs, h0, torch.ones_like(inputs[0]) * 1e-3, torch.ones(1, 1) * 1e-3)
    for x in outputs[:2]:
        assert torch.isfinite(x).all()
    if scale < 1e38:
        for x in outputs[2:]:
            assert torch.isfinite(x).all()


def test_nan_is_not_hidden():
    inputs, h0 = make_inputs("min_gru+g", 1, 6, 2)
    for i in range(len(inputs)):
        poisoned = [x.clone() for x in inputs]
        poisoned[i][0, 2, 0] = float("nan")
        h, last = min_gru_scan(*poisoned, h0)
        assert torch.isnan(h[0, 2:, 0]).all() and torch.isnan(last[0, 0])
        assert torch.isfinite(h[0, :2]).all() and torch.isfinite(h[..., 1]).all()


def test_halves_of_a_projection_are_read_in_place():
    projection = torch.randn(2, 31, 2 * 12, requires_grad=True)
    h, _ = min_gru_scan(*projection.chunk(2, -1))
    expected, _ = min_gru_scan(*(x.contiguous() for x in projection.chunk(2, -1)))
    assert torch.equal(h, expected)
    (grad,) = torch.autograd.grad(h.sum(), projection)
    (expected_grad,) = torch.autograd.grad(expected.sum(), projection)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "reversed batch", "skipping"])
def test_any_layout(layout):
    base = torch.randn(3, 8, 5)
    x = {
        "transposed": base.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": base[:1].expand(3, 8, 5),
        "reversed batch": torch.randn(8, 3, 5).transpose(0, 1),
        "skipping": torch.randn(3, 16, 10)[:, ::2, ::2],
    }[layout]
    assert torch.equal(min_gru_scan(x, x)[0], min_gru_scan(x.contiguous(), x.contiguous())[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    inputs, h0 = make_inputs("min_lstm+g", 1, 50, 200)
    expected = min_lstm_scan(*inputs, h0, normalize=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outputs = min_lstm_scan(*inputs, h0, normalize=False)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))


def test_called_from_many_threads_at_once():
    inputs, h0 = make_inputs("min_gru+g", 2, 400, 64)
    expected = min_gru_scan(*inputs, h0)[0]
    results = []
    workers = [threading.Thread(target=lambda: results.append(min_gru_scan(*inputs, h0)[0])) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 8 and all(torch.equal(x, expected) for x in results)


@pytest.mark.parametrize("gates", GATES)
def test_one_step_is_the_scan(gates):
    inputs, h0 = make_inputs(gates, 3, 1, 7)
    step = reference.scan(gates, inputs, h0)
    scan = op.scan(gates, inputs, h0, None, None, False)
    for x, y in zip(step, scan, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_empty_batch_and_no_time():
    for shape in [(0, 4, 3), (2, 0, 3)]:
        h, last = linear_scan(torch.rand(shape), torch.rand(shape), torch.ones(shape[0], 3))
        assert h.shape == shape and last.shape == (shape[0], 3)
        assert (last == 1).all()


X = torch.zeros(2, 5, 3)
BAD_CALLS = [
    (lambda: linear_scan(X[0], X[0]), ValueError, "a: expected shape"),
    (lambda: linear_scan(X, X[:, :4]), ValueError, "b: expected the shape of a"),
    (lambda: linear_scan(X, X.double()), TypeError, "b: expected the dtype of a"),
    (lambda: linear_scan(X.long(), X.long()), TypeError, "a: expected float32"),
    (lambda: linear_scan(X, X.to("meta")), ValueError, "b: expected on the device of a"),
    (lambda: linear_scan(X, X, X[0]), ValueError, "h0: expected shape"),
    (lambda: linear_scan(X, X, torch.zeros(2, 3, dtype=torch.long)), TypeError, "h0: expected a floating dtype"),
    (lambda: layout_of(X, torch.ones(2, 4)), ValueError, "mask: expected shape"),
    (
        lambda: op.scan("min_gru", [X, X], None, None, torch.tensor([0, 5]), False),
        ValueError,
        "cu_seqlens: packed sequences lie",
    ),
    (lambda: min_gru_scan(X, X, None, layout_of(X[:1], torch.ones(1, 5))), ValueError, "layout.mask: expected shape"),
    (lambda: layout_of(X, None, torch.tensor([0, 5])), ValueError, "rise from 0 to 10"),
    (lambda: layout_of(X[:1], None, torch.tensor([0, 6])), ValueError, "rise from 0 to 5"),
    (lambda: layout_of(X[:1], None, torch.tensor([1, 5])), ValueError, "rise from 0 to 5"),
    (lambda: layout_of(X[:1], None, torch.tensor([0, 4, 2, 5])), ValueError, "rise from 0 to 5"),
    (lambda: layout_of(X[:1], None, torch.tensor([0.0, 5.0])), TypeError, "cu_seqlens: expected int32"),
    (lambda: min_lstm_scan(X, X, X[..., :2]), ValueError, "candidate: expected the shape of forget"),
]


@pytest.mark.parametrize("call, error, message", BAD_CALLS)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_torchs_number_of_threads_stays():
    """numba's pool, when it starts, sets OpenMP's number of threads, which is torch's."""
    code = "import torch\nfrom hf_rnn_kernels import linear_scan\ntorch.set_num_threads(1)\n"
    code += "linear_scan(torch.rand(2, 64, 512), torch.rand(2, 64, 512))\nprint(torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if "THREADS" not in name}
    environment["NUMBA_NUM_THREADS"] = "2"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "1", result.stderr


def test_wrong_offsets_under_compile_are_an_error():
    scan = torch.compile(lambda a, c: linear_scan(a, a, None, SequenceLayout(None, c)), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="rise from 0 to 8"):
        scan(torch.ones(1, 8, 4), torch.tensor([0, 3, 100000]))


def test_masks_of_any_dtype_at_any_length():
    for time in (1, 4):
        x = torch.randn(2, time, 3)
        x[0, 0] = float("nan")
        mask = torch.ones(2, time)
        mask[0, 0] = 0
        for dtype in (torch.float32, torch.float64):
            outputs = [
                min_gru_scan(x.to(dtype), x.to(dtype), torch.ones(2, 3, dtype=dtype), layout_of(x, m))[1]
                for m in (mask, mask.long(), mask.bool())
            ]
            assert all(torch.isfinite(y).all() and torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_after_a_fork():
    """OpenMP's threads do not survive it: the child computes in plain torch instead of being killed."""
    x = torch.randn(1, 5, 4)
    expected = min_gru_scan(x, x)[0]
    child = os.fork()
    if child == 0:
        same = torch.allclose(min_gru_scan(x, x)[0], expected, atol=1e-6)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_forward_mode_is_refused():
    def scan(x):
        return min_gru_scan(x, x)[0]

    x = torch.randn(1, 300, 256)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        scan(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(scan, (x,), (torch.ones_like(x),))
