"""mlstm_scan against the paper's recurrence, written apart from the package's, in float64 and under raw losses."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from conftest import layout_of, relative_error
from hypothesis import given, settings

from hf_rnn_kernels import SequenceLayout, mlstm_scan, mlstm_step

CHECKED = ("test_schema", "test_faketensor")  # there are no gradients
NAMES = ["h", "C", "n", "m", "dq", "dk", "dv", "di", "df", "dC0", "dn0", "dm0"]


def recurrence(q, k, v, i, f, C, n, m, mask=None, eps=1e-6):
    """xLSTM's equations 19 to 27 with the stabiliser of its appendix, by torch's autograd; float64."""
    hs = []
    for t in range(q.shape[1]):
        log_f = torch.nn.functional.logsigmoid(f[:, t])
        new_m = torch.maximum(log_f + m, i[:, t])
        forget, add = (log_f + m - new_m).exp(), (i[:, t] - new_m).exp()
        new_C = torch.einsum("bh,bhkv->bhkv", forget, C) + torch.einsum("bh,bhk,bhv->bhkv", add, k[:, t], v[:, t])
        new_n = torch.einsum("bh,bhk->bhk", forget, n) + torch.einsum("bh,bhk->bhk", add, k[:, t])
        query = q[:, t] / q.shape[-1] ** 0.5
        norm = torch.maximum(torch.einsum("bhk,bhk->bh", new_n, query).abs(), (-new_m).exp()) + eps
        h = torch.einsum("bhkv,bhk->bhv", new_C, query) / norm[..., None]
        real = torch.ones(q.shape[0], 1, dtype=torch.bool) if mask is None else mask[:, t, None].bool()
        hs.append(h.where(real[..., None], 0.0))
        C, n = new_C.where(real[..., None, None], C), new_n.where(real[..., None], n)
        m = new_m.where(real, m)
    return torch.stack(hs, 1), (C, n, m)


def make(batch, time, heads, keys, values, sequences=None, input_bias=0.0, forget_bias=0.0, scale=3.0):
    torch.manual_seed(0)
    n = sequences or batch
    q, k, v = (torch.randn(batch, time, heads, size) for size in (keys, keys, values))
    i, f = (torch.randn(batch, time, heads) * scale + bias for bias in (input_bias, forget_bias))
    return [q, k, v, i, f, torch.randn(n, heads, keys, values), torch.randn(n, heads, keys), torch.randn(n, heads)]


def run(function, leaves, grads, dtype=torch.float32, **options):
    """h, the last states, and the gradients of everything."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in leaves]
    if function is mlstm_scan:
        layout = layout_of(leaves[0], options.pop("mask", None), options.pop("cu_seqlens", None))
        options["layout"] = layout._replace(reverse=options.pop("reverse", False))
    h, last = function(*leaves, **options)
    outputs = [h, *last]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads])]


def cotangents(leaves):
    q, _, v, *_, C, n, m = leaves
    return [torch.randn(*q.shape[:3], v.shape[3]), torch.randn(C.shape), torch.randn(n.shape), torch.randn(m.shape)]


def check(actual, expected):
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        assert x.isfinite().all(), name
        assert relative_error(x, y) <= (1e-5 if name in NAMES[:4] else 1e-4), name


@pytest.mark.parametrize(
    "batch, time, heads, keys, values",
    [
        (2, 1, 1, 3, 5),
        (1, 5, 3, 1, 1),
        (2, 63, 2, 16, 32),
        (2, 64, 1, 32, 64),
        (3, 65, 2, 20, 48),
        (1, 300, 2, 128, 256),
    ],
)
def test_against_the_recurrence(batch, time, heads, keys, values):
    leaves = make(batch, time, heads, keys, values)
    grads = cotangents(leaves)
    check(run(mlstm_scan, leaves, grads), run(recurrence, leaves, grads, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "gates",
    [
        dict(input_bias=-10, forget_bias=4, scale=0.5),  # at initialisation: the floor e^-m divides
        dict(scale=15.0),  # as far as soft caps let them go
        dict(forget_bias=-12, scale=2),  # forgets at once
        dict(forget_bias=25, scale=1),  # never
    ],
)
def test_gates(gates, dtype):
    leaves = make(2, 150, 2, 12, 20, **gates)
    grads = cotangents(leaves)
    check(run(mlstm_scan, leaves, grads, dtype), run(recurrence, leaves, grads, torch.float64))


def test_gates_beyond_float32():
    """e^95 overflows. No floor keeps the normaliser from zero here, and rounding grows with h: at most as much as in
    the recurrence itself in float32."""
    leaves = make(2, 150, 2, 12, 20, input_bias=95)
    grads = cotangents(leaves)
    expected = run(recurrence, leaves, grads, torch.float64)
    plain = run(recurrence, leaves, grads)
    gradients_vanish = ("dC0", "dn0", "dm0")
    for name, x, y, z in zip(NAMES, run(mlstm_scan, leaves, grads), plain, expected, strict=True):
        assert name in gradients_vanish or relative_error(x, z) <= max(relative_error(y, z), 1e-5), name


def test_gradient_through_the_stabiliser():
    """With an eps that counts, h depends on m, and m on the gates and m0."""
    leaves = make(2, 150, 2, 12, 20)
    grads = cotangents(leaves)
    expected = run(recurrence, leaves, grads, torch.float64, eps=0.3)
    check(run(mlstm_scan, leaves, grads, eps=0.3), expected)
    check(run(mlstm_scan, leaves, grads, torch.float64, eps=0.3), expected)


def test_long_memory():
    """4,096 tokens of forget gates that keep for about 1,000."""
    leaves = make(1, 4096, 1, 8, 8, forget_bias=7.0, scale=1.0)
    grads = cotangents(leaves)
    check(run(mlstm_scan, leaves, grads), run(recurrence, leaves, grads, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["left", "right", "anywhere", "all"])
def test_padding(side, dtype):
    leaves = make(3, 140, 2, 12, 20)
    mask = torch.ones(3, 140, dtype=torch.bool)
    if side == "anywhere":
        mask = torch.rand(3, 140) < 0.6
    else:
        mask[0, {"left": slice(100), "right": slice(5, None), "all": slice(None)}[side]] = False
    grads = cotangents(leaves)
    expected = run(recurrence, leaves, grads, torch.float64, mask=mask)
    check(run(mlstm_scan, leaves, grads, dtype, mask=mask), expected)
    for x in leaves[:5]:
        x[~mask] = torch.nan
    check(run(mlstm_scan, leaves, grads, dtype, mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing(dtype):
    lengths = [1, 70, 0, 64, 15]
    leaves = make(1, sum(lengths), 2, 12, 20, sequences=5)
    grads = cotangents(leaves)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.ones(1, sum(lengths), dtype=torch.bool)
    mask[0, 40:50] = False
    actual = run(mlstm_scan, leaves, grads, dtype, mask=mask, cu_seqlens=cu_seqlens)

    def one_by_one(*leaves):
        pieces = []
        for n, (start, stop) in enumerate(pairwise(cu_seqlens)):
            if start < stop:
                own = [x[:, start:stop] for x in leaves[:5]]
                pieces.append(recurrence(*own, *(s[n : n + 1] for s in leaves[5:]), mask=mask[:, start:stop]))
            else:
                pieces.append((leaves[2][:, :0], tuple(s[n : n + 1] for s in leaves[5:])))
        return torch.cat([h for h, _ in pieces], 1), [torch.cat(s) for s in zip(*(p[1] for p in pieces), strict=True)]

    check(actual, run(one_by_one, leaves, grads, torch.float64))


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("batch, lengths", [(3, [140]), (2, [1]), (1, [1, 70, 0, 64, 15]), (1, [0, 129, 0])])
def test_reading_backwards(batch, lengths, dtype, limit):
    """What the tokens in reverse order give, but for the bits in which torch's loops differ from their remainders."""
    time, packed = sum(lengths), len(lengths) > 1
    leaves = make(batch, time, 2, 12, 20, sequences=len(lengths) if packed else batch)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(batch, time) < 0.6
    mask[0, :20] = mask[-1, 60:] = packed  # rows: padding on either side
    grads, eps = cotangents(leaves), 0.1  # an eps that counts: m has a gradient
    order = torch.cat([torch.arange(a, b).flip(0) for a, b in pairwise(offsets)])
    turned = [x[:, order] for x in leaves[:5]] + leaves[5:]
    options = dict(cu_seqlens=offsets if packed else None, eps=eps)
    expected = run(mlstm_scan, turned, [grads[0][:, order], *grads[1:]], dtype, mask=mask[:, order], **options)
    for x in leaves[:5]:
        x[~mask] = torch.nan
    actual = run(mlstm_scan, leaves, grads, dtype, mask=mask, reverse=True, **options)
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        lies = y[:, order] if name in ("h", "dq", "dk", "dv", "di", "df") else y
        assert torch.equal(x == 0, lies == 0) and relative_error(x, lies) <= limit, name


@settings(max_examples=25, deadline=None)
@given(time=st.integers(2, 200), cut=st.integers(1, 199), steps=st.integers(0, 3), reverse=st.booleans())
def test_splitting(time, cut, steps, reverse):
    """Anywhere, the last tokens of the first piece one by one."""
    leaves = make(2, time, 2, 6, 10)[:5]
    cut, layout = min(cut, time), SequenceLayout(reverse=reverse)
    h, last = mlstm_scan(*leaves, layout=layout)
    steps = min(steps, cut - 1)
    pieces, state = [], (None, None, None)
    spans = [(0, cut - steps), *((t, t + 1) for t in range(cut - steps, cut)), (cut, time)]
    for start, stop in reversed(spans) if reverse else spans:
        if start < stop:
            piece, state = mlstm_scan(*(x[:, start:stop] for x in leaves), *state, layout)
            pieces.append(piece)
    assert relative_error(torch.cat(pieces[::-1] if reverse else pieces, 1), h) <= 1e-5
    for a, b in zip(state, last, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_step():
    leaves = make(2, 1, 3, 6, 10)
    expected_h, expected = recurrence(*(x.double() for x in leaves))
    states = [s.clone() for s in leaves[5:]]
    h = mlstm_step(*(x[:, 0] for x in leaves[:5]), *states)
    for a, b in ((h, expected_h[:, 0]), *zip(states, expected, strict=True)):
        assert relative_error(a, b) <= 1e-6
    h = mlstm_step(*(x[:, 0].bfloat16() for x in leaves[:5]), *states)
    assert h.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in states)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    """Inputs of 16 bits, gates in either dtype: states and what is inside stay float32."""
    leaves = make(2, 90, 2, 16, 16)
    rounded = [x.to(dtype) for x in leaves[:3]]
    h, last = mlstm_scan(*rounded, *leaves[3:])
    expected, expected_last = recurrence(*(x.double() for x in (*rounded, *leaves[3:])))
    assert h.dtype == dtype and relative_error(h, expected) <= tolerance
    for a, b in zip(last, expected_last, strict=True):
        assert a.dtype == torch.float32 and relative_error(a, b) <= 1e-5


def test_strided_views():
    """Slices of one projection, as a model has them, and a transposed layout."""
    leaves = make(2, 70, 2, 8, 12)
    joined = torch.cat([x.flatten(2) for x in leaves[:3]], -1)
    views = [x.unflatten(-1, (2, -1)) for x in joined.split([16, 16, 24], -1)]
    assert torch.equal(mlstm_scan(*views, *leaves[3:])[0], mlstm_scan(*leaves)[0])
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves[:5]]
    assert torch.equal(mlstm_scan(*turned, *leaves[5:])[0], mlstm_scan(*leaves)[0])


def test_empty():
    leaves = make(2, 0, 2, 3, 4)
    h, last = mlstm_scan(*leaves)
    assert h.shape == (2, 0, 2, 4) and all(torch.equal(a, b) for a, b in zip(last, leaves[5:], strict=True))
    grads = cotangents(leaves)
    assert all(torch.equal(a, b) for a, b in zip(run(mlstm_scan, leaves, grads)[-3:], grads[1:], strict=True))


@pytest.mark.parametrize("closed", [-torch.inf, -1e30])
def test_a_gate_that_forgets_everything(closed):
    leaves = make(2, 70, 2, 4, 6)
    leaves[4][:, 9] = closed
    h, last = mlstm_scan(*leaves)
    expected, expected_last = recurrence(*(x.double() for x in leaves))
    for a, b in ((h, expected), *zip(last, expected_last, strict=True)):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_registration(reverse):
    leaves = [x.requires_grad_() for x in make(2, 20, 2, 4, 6)]
    torch.library.opcheck(torch.ops.hf_rnn.mlstm_scan, (*leaves[:5], leaves[5:], None, None, 1e-6, True, reverse))
    compiled, layout = torch.compile(mlstm_scan, fullgraph=True), SequenceLayout(reverse=reverse)
    assert relative_error(compiled(*leaves, layout)[0], mlstm_scan(*leaves, layout)[0]) <= 1e-6


def test_a_compiled_step_is_one_operator_that_writes_to_the_states():
    leaves = make(2, 1, 3, 6, 10)
    token, first = [x[:, 0] for x in leaves[:5]], leaves[5:]
    real = torch.tensor([True, False])
    states = [s.clone() for s in first]
    torch.library.opcheck(torch.ops.hf_rnn.mlstm_step.default, (*token, *states, real, 1e-6), test_utils=CHECKED)
    expected, states = [s.clone() for s in first], [s.clone() for s in first]
    h = mlstm_step(*token, *expected, real)
    compiled = torch.compile(mlstm_step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*token, *states, real), h) and not h[1].any()
    for a, b, before in zip(states, expected, first, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1], before[1]) and not torch.equal(a[0], before[0])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(k=lambda x: x[..., :2]), ValueError, "k: expected shape"),
        (dict(v=lambda x: x[:, :3]), ValueError, "v: expected shape"),
        (dict(q=lambda x: x[0]), ValueError, "q: expected shape"),
        (dict(f=lambda x: x[..., None]), ValueError, "f: expected the shape of i"),
        (dict(C0=lambda x: x[:1]), ValueError, "C0: expected shape"),
        (dict(m0=lambda x: x.long()), TypeError, "m0: expected a floating dtype"),
        (dict(v=lambda x: x.half()), TypeError, "v: expected the dtype of q"),
        (dict(layout=lambda _: SequenceLayout(torch.ones(2, 3).bool())), ValueError, "layout.mask: expected shape"),
    ],
)
def test_bad_input(change, error, message):
    arguments = dict(zip(["q", "k", "v", "i", "f", "C0", "n0", "m0"], make(2, 9, 2, 3, 4), strict=True))
    for name, how in change.items():
        arguments[name] = how(arguments.get(name))
    with pytest.raises(error, match=message):
        mlstm_scan(**arguments)
