"""lstm_scan, gru_scan and slstm_scan on a CPU, against torch.nn in float64 with the same weights, under raw losses; for
sLSTM, which torch.nn lacks, against a loop that is written another way.
"""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from conftest import layout_of, relative_error
from flashrnn import flashrnn
from hypothesis import given, settings
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import hf_rnn_kernels
from hf_rnn.exchange.gate_order import from_flashrnn, to_gate_major, to_head_major
from hf_rnn_kernels import SequenceLayout, gru_scan, lstm_scan, min_gru_scan, slstm_scan
from hf_rnn_kernels.recurrent_scan import cpu, op, reference
from hf_rnn_kernels.recurrent_scan.weight_gradients import weight_gradients

SCANS = {cell: getattr(hf_rnn_kernels, f"{cell}_scan") for cell in sorted(reference.CELLS)}
CELLS = list(SCANS)


def make(cell, batch, time, heads, size, sequences=None, scale=1.0, dtype=torch.float32):
    """x, weight, bias and the initial states."""
    torch.manual_seed(0)
    gates, states = reference.CELLS[cell].gates, reference.CELLS[cell].states
    x = torch.randn(batch, time, heads * gates * size) * scale
    weight = torch.randn(heads, gates * size, size) / size**0.5
    bias = torch.randn(heads * gates * size) * scale
    initial = [torch.randn(sequences or batch, heads * size) for _ in range(states)]
    if cell == "slstm":
        initial[2] = initial[2].abs() + 0.5  # n, a sum of weights
    return [t.to(dtype) for t in (x, weight, bias, *initial)]


def run(cell, leaves, grad, grad_last, mask=None, cu_seqlens=None, reverse=False):
    """h, last states, and the gradients of x, weight, bias and the initial states."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    h, _, last = op.scan(cell, *leaves[:3], leaves[3:], mask, cu_seqlens, True, [], reverse)
    return [h.detach(), last.detach(), *torch.autograd.grad([h, last], leaves, [grad, grad_last])]


def torch_float64(cell, leaves, grad, grad_last):
    """The same from torch.nn in float64: heads as a dense matrix with zeros, x through an identity."""
    if cell == "slstm":
        return slstm_float64(leaves, grad, grad_last)
    x, weight, bias, *initial = [t.double().requires_grad_() for t in leaves]
    heads, rows, size = weight.shape
    gates, channels = rows // size, heads * size
    rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](gates * channels, channels, batch_first=True).double()
    blocks = weight.view(heads, gates, size, size)
    parameters = {
        "weight_ih_l0": torch.eye(gates * channels).double(),
        "weight_hh_l0": torch.cat([torch.block_diag(*blocks[:, g]) for g in range(gates)]),
        "bias_ih_l0": torch.zeros(gates * channels).double(),
        "bias_hh_l0": to_gate_major(bias, gates, heads),
    }
    gate_major = to_gate_major(x.movedim(2, 0), gates, heads).movedim(0, 2)
    states = tuple(s[None] for s in initial)
    h, last = torch.func.functional_call(rnn, parameters, (gate_major, states if cell == "lstm" else states[0]))
    last = torch.cat(last) if cell == "lstm" else last
    grads = torch.autograd.grad([h, last], [x, weight, bias, *initial], [grad.double(), grad_last.double()])
    return [h.detach(), last.detach(), *grads]


def slstm_float64(leaves, grad, grad_last, mask=None):
    """sLSTM without its maximum, by autograd: C_t = s(f) C_{t-1} + e^i tanh(z), N_t = s(f) N_{t-1} + e^i, c and n being
    e^-m times as much."""
    leaves = [t.double().requires_grad_() for t in leaves]
    x, weight, bias, *initial = leaves
    heads, rows, size = weight.shape
    h, c, n, m = (s.unflatten(1, (heads, size)) for s in initial)
    started = n != 0  # before that, C is 0 whatever c is
    big_c, big_n = (torch.where(started, s * m.where(started, 0).exp(), 0) for s in (c, n))
    steps = []
    for t in range(x.shape[1]):
        pre = x[:, t].view(-1, heads, rows) + torch.einsum("hrp,bhp->bhr", weight, h) + bias.view(heads, rows)
        i, f, z, o = pre.unflatten(2, (4, size)).unbind(2)
        new_c, new_n = f.sigmoid() * big_c + i.exp() * z.tanh(), f.sigmoid() * big_n + i.exp()
        new_m = torch.where(started, torch.maximum(torch.nn.functional.logsigmoid(f) + m, i), i)
        new = (o.sigmoid() * new_c / new_n, new_c, new_n, new_m, torch.ones_like(started))
        real = torch.ones(x.shape[0], 1, 1).bool() if mask is None else mask[:, t, None, None]
        pairs = zip(new, (h, big_c, big_n, m, started), strict=True)
        h, big_c, big_n, m, started = (torch.where(real, a, b) for a, b in pairs)
        steps.append(h)
    pairs = (big_c, initial[1]), (big_n, initial[2])
    c, n = (torch.where(started, big * (-m).exp(), s.view_as(m)) for big, s in pairs)
    outputs = [torch.stack(steps, 1).flatten(2), torch.stack([s.flatten(1) for s in (h, c, n, m)])]
    grads = torch.autograd.grad(outputs, leaves, [grad.double(), grad_last.double()])
    return [*(t.detach() for t in outputs), *grads]


def check(actual, expected, forward=1e-6, backward=1e-5):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert relative_error(x, y) <= (forward if i < 2 else backward), i


def cotangents(leaves, channels):
    states = torch.stack(leaves[3:])
    return torch.randn(*leaves[0].shape[:2], channels).to(leaves[0].dtype), torch.randn(states.shape)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "batch, time, heads, size",
    [(2, 1, 1, 5), (1, 2, 3, 1), (3, 37, 1, 19), (5, 37, 3, 7), (18, 9, 2, 33), (2, 1000, 2, 16), (1, 4096, 1, 24)],
)
def test_against_torch_in_float64(cell, batch, time, heads, size):
    leaves = make(cell, batch, time, heads, size)
    grads = cotangents(leaves, heads * size)
    check(run(cell, leaves, *grads), torch_float64(cell, leaves, *grads))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scale", [1e-3, 5.0])
def test_small_and_large_preactivations(cell, scale):
    """Small ones: tanh must not lose what 2 * sigmoid(2x) - 1 would."""
    leaves = make(cell, 2, 50, 1, 9, scale=scale)
    for state in leaves[3:]:
        state.mul_(scale)
    grads = cotangents(leaves, 9)
    check(run(cell, leaves, *grads), torch_float64(cell, leaves, *grads))


@pytest.mark.parametrize("cell", CELLS)
def test_slow_gates(cell):
    """Memory of 3,000 steps: gates that keep are constant, so that their rounding does not average out. torch.nn in
    float32 is off by 4e-5 here."""
    leaves = make(cell, 1, 4096, 1, 3)
    x, weight = leaves[:2]
    x[..., 3:6] = 8.0
    weight[:, 3:6] = 0
    leaves[2][3:6] = 0
    grads = cotangents(leaves, 3)
    check(run(cell, leaves, *grads), torch_float64(cell, leaves, *grads), forward=3e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_heads_are_a_dense_matrix_with_zeros(cell):
    heads, size, gates = 3, 8, reference.CELLS[cell].gates
    leaves = make(cell, 2, 21, heads, size)
    x, weight, bias = leaves[:3]
    blocks = weight.view(heads, gates, size, size)
    dense = torch.cat([torch.block_diag(*blocks[:, g]) for g in range(gates)])[None]
    moved = to_gate_major(x.movedim(2, 0), gates, heads).movedim(0, 2)
    scan = SCANS[cell]
    h, _ = scan(x, weight, bias, *leaves[3:])
    expected, _ = scan(moved, dense, to_gate_major(bias, gates, heads), *leaves[3:])
    assert relative_error(h, expected) <= 1e-6
    assert torch.equal(to_head_major(to_gate_major(bias, gates, heads), gates, heads), bias)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_variable_lengths_against_pack_padded_sequence(cell):
    """Padded with a mask, and packed with offsets, against torch's packed sequences, gradients included."""
    lengths, size = [7, 40, 1, 23], 11
    leaves = make(cell, 4, 40, 1, size)
    gates = leaves[1].shape[1]
    rnn = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](gates, size, batch_first=True).double()
    x, weight, bias, *initial = [t.double().requires_grad_() for t in leaves]
    parameters = {"weight_ih_l0": torch.eye(gates).double(), "weight_hh_l0": weight[0]}
    parameters |= {"bias_ih_l0": torch.zeros(gates).double(), "bias_hh_l0": bias}
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    states = tuple(s[None] for s in initial)
    h, last = torch.func.functional_call(rnn, parameters, (packed, states if cell == "lstm" else states[0]))
    h, last = pad_packed_sequence(h, batch_first=True)[0], torch.cat(last) if cell == "lstm" else last
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    grad, grad_last = torch.randn(4, 40, size) * mask[..., None], torch.randn(len(initial), 4, size)
    expected = torch.autograd.grad([h, last], [x, weight, bias, *initial], [grad.double(), grad_last.double()])
    expected = [h.detach(), last.detach(), *expected]

    padded = run(cell, leaves, grad, grad_last, mask=mask)
    padded[0] = padded[0] * mask[..., None]
    check(padded, expected)

    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    flat = [leaves[0][mask][None], *leaves[1:]]
    together = run(cell, flat, grad[mask][None], grad_last, cu_seqlens=cu_seqlens)
    expected[0], expected[2] = expected[0][mask][None], expected[2][mask][None]
    check(together, expected)


@pytest.mark.parametrize("cell", CELLS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_masked_and_packed_against_one_by_one(cell, data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any))
    total, heads, size = sum(lengths), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    leaves = make(cell, 1, total, heads, size, sequences=len(lengths))
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=total, max_size=total))])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    grad, grad_last = cotangents(leaves, heads * size)
    grad = grad * mask[..., None]
    h, last, grad_x, *others = run(cell, leaves, grad, grad_last, mask=mask, cu_seqlens=cu_seqlens)
    sums = [torch.zeros_like(g) for g in others[:2]]
    for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        real = torch.arange(start, stop)[mask[0, start:stop]]
        if len(real) == 0:
            assert torch.equal(last[:, n], torch.stack([s[n] for s in leaves[3:]]))
            continue
        alone = [leaves[0][:, real], *leaves[1:3], *(s[n : n + 1] for s in leaves[3:])]
        expected = run(cell, alone, grad[:, real], grad_last[:, n : n + 1])
        torch.testing.assert_close(h[:, real], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(last[:, n : n + 1], expected[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad_x[:, real], expected[2], rtol=1e-4, atol=1e-5)
        sums = [a + b for a, b in zip(sums, expected[3:5], strict=True)]
        for x, y in zip(others[2:], expected[5:], strict=True):
            torch.testing.assert_close(x[n : n + 1], y, rtol=1e-4, atol=1e-5)
    for x, y in zip(others[:2], sums, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert not grad_x[0, ~mask[0]].any()


@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_of_paddings_output(cell):
    """Its output is its predecessor's state, so the gradient is that of the predecessor, or of the initial state."""
    leaves = make(cell, 1, 5, 1, 3)
    mask = torch.tensor([[0, 1, 0, 0, 1]]).bool()
    grad, grad_last = cotangents(leaves, 3)
    moved, to_first = grad.clone(), grad[:, 0]
    moved[:, 1] += moved[:, 2] + moved[:, 3]
    moved = moved * mask[..., None]
    expected = run(cell, leaves, moved, grad_last, mask=mask)
    expected[5] = expected[5] + to_first
    for x, y in zip(run(cell, leaves, grad, grad_last, mask=mask), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_padding_and_packing_change_no_bit(cell):
    x, weight, bias, *initial = make(cell, 2, 9, 2, 16)
    scan = SCANS[cell]
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0, 0], [1] * 9]).bool()
    h, _ = scan(x, weight, bias, *initial, layout_of(x, mask))
    alone, _ = scan(x[:1, mask[0]], weight, bias, *(s[:1] for s in initial))
    assert torch.equal(h[:1, mask[0]], alone)
    flat = x.reshape(1, 18, -1)
    packed, _ = scan(flat, weight, bias, *initial, layout_of(flat, None, torch.tensor([0, 9, 18])))
    assert torch.equal(packed[0, 9:], h[1])


@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm"])
def test_against_flashrnn(cell):
    torch.manual_seed(0)
    gates = reference.CELLS[cell].gates
    Wx, R, b = torch.randn(2, 13, gates, 3, 16), torch.randn(gates, 3, 16, 16) / 4, torch.randn(4, 3, 16)
    states, _ = flashrnn(Wx, R, b, function=cell, backend="vanilla", dtype="float32")
    ours = from_flashrnn("gru" if cell == "gru" else "lstm", R, b)  # those of an sLSTM lie as those of an LSTM
    x = Wx.transpose(2, 3).reshape(2, 13, -1) + ours["in_proj.bias"]
    scan = SCANS[cell]
    h, _ = scan(x, ours["recurrent_weight"], ours["recurrent_bias"])
    assert relative_error(h.view(2, 13, 3, 16), states[0]) <= 1e-6


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(cell, dtype):
    leaves = make(cell, 2, 100, 2, 17)
    leaves[0] = leaves[0].to(dtype)  # weights stay in float32, as under autocast
    grad, grad_last = cotangents(leaves, 34)
    outputs = run(cell, leaves, grad, grad_last)
    assert [x.dtype for x in outputs[:4]] == [dtype, torch.float32, dtype, torch.float32]
    check(outputs, torch_float64(cell, leaves, grad, grad_last), 1e-2, 1e-2)


@pytest.mark.parametrize("cell", CELLS)
def test_the_plain_torch_path(cell):
    """What float64 runs on, and every dtype where no compiled backend is installed."""
    leaves = make(cell, 3, 12, 2, 5)
    grad, grad_last = cotangents(leaves, 10)
    expected = torch_float64(cell, leaves, grad, grad_last)
    check(run(cell, [x.double() for x in leaves], grad.double(), grad_last.double()), expected, 1e-13, 1e-13)
    h, others, last = reference.scan(cell, *leaves[:3], leaves[3:], training=True)
    grads = reference.scan_backward(cell, *leaves[:3], leaves[3:], None, None, h, others, grad, grad_last)
    check([h, last, *grads[:3], *grads[3]], expected)


@pytest.mark.parametrize("cell, reverse", [*((cell, False) for cell in CELLS), ("lstm", True)])
def test_gradcheck(cell, reverse):
    mask, cu_seqlens = torch.tensor([[1, 0, 1, 1, 1, 0]]).bool(), torch.tensor([0, 2, 2, 6, 6])
    leaves = [t.double().requires_grad_() for t in make(cell, 1, 6, 2, 3, sequences=4)]
    run = lambda *t: op.scan(cell, *t[:3], list(t[3:]), mask, cu_seqlens, True, [], reverse)[::2]  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_weight_gradients_after_the_loop(cell, packed, reverse):
    """One product over all tokens, with the token of each sequence that is read first put right."""
    sequences, size = (5, 4) if packed else (2, 4)
    leaves = make(cell, 1 if packed else 2, 9, 3, size, sequences)
    cu_seqlens = torch.tensor([0, 0, 4, 5, 9, 9]) if packed else None
    gates = reference.CELLS[cell].gates
    x, weight, _, *initial = [t.double() for t in leaves]
    d, h = torch.randn_like(x), torch.randn(*x.shape[:2], 3 * size, dtype=torch.float64)
    count = reference.STEPS_BACK[cell].own
    own = torch.randn(*x.shape[:2], 3 * count * size, dtype=torch.float64)
    grad_weight, grad_bias = weight_gradients(d, own, weight, h, initial, cu_seqlens, reverse)
    d = d.unflatten(2, (3, gates, size)).clone()
    d[..., gates - count :, :] = own.unflatten(2, (3, count, size))
    bounds = cu_seqlens.tolist() if packed else [0, 9]
    before = torch.zeros_like(h)
    for row in range(x.shape[0]):
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            first = initial[0][n if packed else row, None]
            near = [h[row, start:stop], first] if reverse else [first, h[row, start:stop]]
            before[row, start:stop] = torch.cat(near)[reverse : stop - start + reverse]
    expected = torch.einsum("bthgi,bthj->hgij", d, before.unflatten(2, (3, size))).flatten(1, 2)
    torch.testing.assert_close(grad_weight, expected)
    torch.testing.assert_close(grad_bias, d.sum((0, 1)).flatten())


@pytest.mark.parametrize("cell", CELLS)
def test_registration(cell):
    x, weight, bias, *initial = [t.requires_grad_() for t in make(cell, 2, 7, 2, 3)]
    mask = torch.ones(2, 7, dtype=torch.bool)
    torch.library.opcheck(op.scan.operator, (cell, x, weight, bias, initial, mask, None, True, [], False))
    torch.library.opcheck(op.scan.operator, (cell, x, weight, None, [], None, None, True, [], False))
    plain = [t.detach() for t in (x, weight, bias)]
    torch.library.opcheck(op.scan.operator, (cell, *plain, [], None, None, False, [], False))
    cu_seqlens = torch.tensor([0, 3, 7])
    torch.library.opcheck(op.scan.operator, (cell, x[:1], weight, bias, [], None, cu_seqlens, True, [], True))


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_differentiated(cell):
    """Frozen weights, a loss on the last states alone, and one on h alone."""
    x, weight, bias, *initial = make(cell, 2, 7, 2, 3)
    scan = SCANS[cell]
    for pick in (lambda h, last: h.sum(), lambda h, last: (last[0] if isinstance(last, tuple) else last).sum()):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(pick(*scan(leaf, weight, bias, *initial)), leaf)
        whole = [t.clone().requires_grad_() for t in (x, weight, bias, *initial)]
        expected = torch.autograd.grad(pick(*scan(*whole)), whole)[0]
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scale", [1e2, 1e4, 3e38])
def test_finite_for_finite_input(cell, scale):
    leaves = make(cell, 1, 6, 1, 4)
    leaves[0] = torch.tensor([-1.0, -1e-3, 0.0, 1.0]).repeat(6, leaves[0].shape[2] // 4)[None] * scale
    outputs = run(cell, leaves, torch.ones(1, 6, 4), torch.ones(len(leaves) - 3, 1, 4))
    assert all(torch.isfinite(x).all() for x in outputs)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_is_not_hidden(cell):
    x, weight, bias, *initial = make(cell, 2, 6, 2, 3)
    x[0, 2, 0] = float("nan")
    h, _ = SCANS[cell](x, weight, bias, *initial)
    assert h[0, 3:, :3].isnan().all()
    assert h[0, :2].isfinite().all() and h[1].isfinite().all() and h[0, :, 3:].isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_any_layout_and_number_of_threads(cell):
    x, weight, bias, *initial = make(cell, 6, 20, 3, 8)
    scan = SCANS[cell]
    expected, _ = scan(x, weight, bias, *initial)
    strided = [torch.stack([t, t], -1)[..., 0] for t in (x, weight, bias, *initial)]
    assert torch.equal(scan(*strided)[0], expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(scan(x, weight, bias, *initial)[0], expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cell", CELLS)
def test_one_step_is_the_scan(cell):
    leaves = make(cell, 3, 1, 2, 7)
    step = SCANS[cell](*leaves)
    h, _, last = cpu.scan(cell, *leaves[:3], leaves[3:])
    torch.testing.assert_close(step[0], h, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.stack(step[1]) if isinstance(step[1], tuple) else step[1][None], last, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_batch_and_no_time(shape):
    x, weight, bias, *initial = [t.requires_grad_() for t in make("lstm", *shape, 2, 3)]
    h, (last, _) = lstm_scan(x, weight, bias, *initial)
    assert h.shape == (*shape, 6) and torch.equal(last, initial[0])
    (h.sum() + last.sum()).backward()
    assert not weight.grad.any()


X, W = torch.zeros(2, 5, 24), torch.zeros(2, 12, 3)
BAD_CALLS = [
    (lambda: lstm_scan(X, W[0]), ValueError, r"weight: expected shape \(H, 4 \* P, P\)"),
    (lambda: lstm_scan(X, torch.zeros(2, 9, 3)), ValueError, r"weight: expected shape \(H, 4 \* P, P\)"),
    (lambda: gru_scan(X, W), ValueError, r"weight: expected shape \(H, 3 \* P, P\)"),
    (lambda: slstm_scan(X, W, n0=torch.zeros(2, 5)), ValueError, r"n0: expected shape \(2, 6\)"),
    (lambda: lstm_scan(X[..., :20], W), ValueError, r"x: expected 24 = H \* 4 \* P channels"),
    (lambda: lstm_scan(X[0], W), ValueError, r"x: expected shape \(B, T, D\)"),
    (lambda: lstm_scan(X.long(), W), TypeError, "x: expected float32"),
    (lambda: lstm_scan(X, W.long()), TypeError, "weight: expected a floating dtype"),
    (lambda: lstm_scan(X, W.to("meta")), ValueError, "weight: expected on the device of x"),
    (lambda: lstm_scan(X, W, torch.zeros(12)), ValueError, r"bias: expected shape \(24,\)"),
    (lambda: lstm_scan(X, W, None, torch.zeros(2, 5)), ValueError, r"h0: expected shape \(2, 6\)"),
    (lambda: lstm_scan(X, W, None, None, torch.zeros(1, 6)), ValueError, r"c0: expected shape \(2, 6\)"),
    (
        lambda: lstm_scan(X, W, layout=SequenceLayout(torch.ones(2, 4).bool())),
        ValueError,
        "layout.mask: expected shape",
    ),
    (lambda: lstm_scan(X[:1], W, layout=SequenceLayout(None, torch.tensor([0, 6]))), ValueError, "rise from 0 to 5"),
    (lambda: lstm_scan(X[..., :7], W, input_weight=torch.zeros(24, 6)), ValueError, "input_weight: expected shape"),
]


@pytest.mark.parametrize("call, error, message", BAD_CALLS)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_operator_refuses_to_lose_a_gradient():
    x, weight, bias, *initial = make("lstm", 1, 3, 1, 2)
    with pytest.raises(RuntimeError, match="training=False"):
        op.scan("lstm", x.requires_grad_(), weight, bias, initial, None, None, False, [], False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offsets", [[0, 9, 4, 8], [0, 3, 5], [2, 8], [0, 10**6]])
def test_wrong_offsets_under_compile(dtype, offsets):
    """Their values are not known when the call is traced; the loops would write through them."""
    x, weight, *_ = make("lstm", 1, 8, 1, 3, dtype=dtype)
    run = torch.compile(
        lambda x, w, c: lstm_scan(x, w, layout=layout_of(x, None, c))[0], backend="aot_eager", fullgraph=True
    )
    with pytest.raises(ValueError, match="rise from 0 to 8"):
        run(x, weight, torch.tensor(offsets))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 5, 23)), "x: expected shape"),
        (dict(weight=torch.zeros(2, 11, 3)), "weight: expected shape|x: expected shape"),
        (dict(bias=torch.zeros(5)), "bias: expected shape"),
        (dict(states=[torch.zeros(1, 6)] * 2), r"states\[0\]: expected shape \(2, 6\)"),
        (dict(states=[torch.zeros(2, 6)]), "states: expected 2 of a lstm"),
        (dict(mask=torch.ones(1, 1)), "mask: expected shape"),
    ],
)
def test_the_operator_itself_checks_shapes(change, message):
    arguments = dict(cell="lstm", x=X, weight=W, bias=torch.zeros(24), states=[], mask=None, cu_seqlens=None)
    with pytest.raises(ValueError, match=message):
        op.scan(*(arguments | change).values(), False, [], False)


def test_one_initial_state_without_the_other():
    x, weight, bias, h0, c0 = make("lstm", 2, 4, 2, 3)
    for one, both in [((h0, None), (h0, 0 * c0)), ((None, c0), (0 * h0, c0))]:
        for a, b in zip(lstm_scan(x, weight, bias, *one)[1], lstm_scan(x, weight, bias, *both)[1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scan", [*SCANS.values(), min_gru_scan])
def test_what_padding_holds_does_not_matter(scan, dtype, time):
    """NaN there reaches neither outputs nor gradients."""
    cell = "gru" if scan is min_gru_scan else scan.__name__.removesuffix("_scan")
    x, weight, _, *initial = make(cell, 2, time, 1, 3, dtype=dtype)
    x[0, 0] = float("nan")
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, 0] = False
    inputs = (
        [x[..., :3].clone(), x[..., 3:6].clone(), initial[0]] if scan is min_gru_scan else [x, weight, None, *initial]
    )
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    h, _ = scan(*inputs, SequenceLayout(mask))
    assert h.isfinite().all()
    for grad in torch.autograd.grad(h.sum(), leaves):
        assert grad.isfinite().all()
