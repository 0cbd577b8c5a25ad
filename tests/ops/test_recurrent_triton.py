"""The Triton backend of recurrent_scan, tested as that of gated_scan is in `test_triton.py`."""

import itertools

import pytest
import torch

from hf_rnn_kernels.recurrent_scan import op, reference

triton = pytest.importorskip("triton")
from ops import test_triton as shared  # noqa: E402

from hf_rnn_kernels.recurrent_scan import triton as backend  # noqa: E402

gpu, target = shared.gpu, shared.target

CELLS = sorted(reference.CELLS)
HELD = [backend._forward, backend._recompute, backend._backward]
STREAMED = [backend._forward_streamed, backend._recompute_streamed, backend._backward_streamed]
NAMES = ["h", "others", "last", "grad x", "grad weight", "grad bias", "grad states"]


def make(cell, batch, time, heads, size, dtype=torch.float32, device="cpu", strided=False):
    """x, weight, bias; x a slice of something larger if `strided`."""
    torch.manual_seed(0)
    width = heads * reference.CELLS[cell].gates * size
    x = torch.randn(batch, time, width + 5 * strided)[..., :width]
    weight, bias = torch.randn(heads, width // heads, size) / size**0.5, torch.randn(width)
    whole = torch.zeros(batch, time, width + 5 * strided, dtype=dtype, device=device)[..., :width]
    return whole.copy_(x), weight.to(device, dtype), bias.to(device, dtype)


def make_states(cell, sequences, units, device="cpu"):
    states = list(torch.randn(reference.CELLS[cell].states, sequences, units, device=device).unbind(0))
    if cell == "slstm":
        states[2] = states[2].abs() + 0.5  # n, a sum of weights
        states[2][::2] = 0  # and some that start from nothing
    return states


def errors(run, cell, x, weight, bias, states=(), mask=None, cu_seqlens=None, reverse=False):
    """Relative errors of all results, forward and backward, against the reference in float64."""

    def exact(x):
        return None if x is None else x.cpu().double() if x.is_floating_point() else x.cpu()

    arguments = [*map(exact, (x, weight, bias)), [exact(s) for s in states], exact(mask), exact(cu_seqlens)]
    h, others, last = reference.scan(cell, *arguments, training=True, reverse=reverse)
    grad, grad_last = torch.randn(h.shape).to(x.dtype), torch.randn(last.shape)
    back = reference.scan_backward(cell, *arguments, h, others, grad.double(), grad_last.double(), reverse)
    expected = [h, others, last, *back]
    grads = grad.to(x.device), grad_last.to(x.device)
    actual = run(cell, x, weight, bias, list(states), mask, cu_seqlens, *grads, reverse)
    dtypes = [x.dtype, torch.float32, torch.float32, x.dtype, weight.dtype, torch.float32, torch.float32]
    result = {}
    for name, a, e, dtype in zip(NAMES, actual, expected, dtypes, strict=True):
        if a is not None:  # what the operator does not show
            assert a.shape == e.shape and a.dtype == dtype, name
            result[name] = ((a.cpu().double() - e).norm() / e.norm().clamp_min(1e-30)).item()
    return result


def run_backend(cell, x, weight, bias, states, mask, cu_seqlens, grad, grad_last, reverse):
    arguments = (cell, x, weight, bias, states, mask, cu_seqlens)
    h, others, last = backend.scan(*arguments, True, reverse=reverse)
    plain = backend.scan(*arguments, False, reverse=reverse)
    assert torch.equal(plain[0], h) and torch.equal(plain[2], last) and plain[1].shape[2] == 0
    return h, others, last, *backend.scan_backward(*arguments, h, others, grad, grad_last, reverse)


def run_op(cell, x, weight, bias, states, mask, cu_seqlens, grad, grad_last, reverse):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, *states)]
    h, others, last = op.scan(cell, *leaves[:3], leaves[3:], mask, cu_seqlens, True, [], reverse)
    grads = torch.autograd.grad([h, last], leaves, [grad, grad_last])
    return h, others, last, *grads[:2], grads[2].float(), torch.stack(grads[3:]) if states else None


def check(result, forward=1e-6, backward=1e-5):
    for name, error in result.items():
        assert error <= (backward if name.startswith("grad") else forward), result  # NaN fails, too


@pytest.fixture(params=["held", "streamed"])
def path(request, monkeypatch):
    """Where R is, whatever its size."""
    if request.param == "streamed":
        monkeypatch.setattr(backend, "_chip", lambda device: (0, False))
    return request.param


# Compilation, by the driver of `test_triton.py`, which launches nothing.


@pytest.fixture
def chip(target, monkeypatch):
    """The GPU that is not there, also for the choice of tiles."""
    amd = target.startswith("gfx")
    room = backend.ROOM if amd else shared.TARGETS[target][1]
    monkeypatch.setattr(backend, "_chip", lambda device: (room, amd))
    yield target
    for kernel in HELD + STREAMED:
        kernel.device_caches.pop(target, None)


def launch(cell, dtype=torch.bfloat16, shape=(2, 4, 2, 64), mask=False, packed=False, reverse=False):
    batch, time, heads, size = shape
    x, weight, bias = make(cell, 1 if packed else batch, batch * time if packed else time, heads, size, dtype)
    cu_seqlens = torch.tensor([0, *range(2, batch + 1), batch * time]) if packed else None
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask else None
    arguments = (cell, x, weight, bias, [], mask, cu_seqlens)
    h, others, last = backend.scan(*arguments, True, reverse=reverse)
    backend.scan_backward(*arguments, h, others, h, last, reverse)


def kernels_for(target):
    return {kernel.__name__: list(kernel.device_caches[target][0].values()) for kernel in HELD + STREAMED}


def check_compiled(target, expected, spilled=0):
    compiled = kernels_for(target)
    assert {name for name, kernels in compiled.items() if kernels} == {kernel.__name__ for kernel in expected}
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.metadata.shared <= shared.TARGETS[target][1], name
            found = shared.spills(kernel)
            found.pop("sgpr_spill_count", None)  # scalars spill to lanes of a vector register
            assert found and max(found.values()) <= spilled, (name, found)


def spilled(cell, dtype, size):
    """Bytes: nothing for the usual heads in 16 bits, or three registers where an sLSTM carries five tiles of 128 units;
    elsewhere ptxas gives up some for occupancy."""
    if dtype != torch.float32 and size in (64, 128):
        return 12 if cell == "slstm" and size == 128 else 0
    return 96 if cell == "slstm" else 64


@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
@pytest.mark.parametrize(
    "cell, dtype, size, mask, packed, reverse, path",
    [
        ("lstm", torch.bfloat16, 64, True, False, False, HELD),
        ("gru", torch.float32, 64, False, True, True, HELD),
        ("lstm", torch.bfloat16, 128, True, True, False, HELD),
        ("slstm", torch.bfloat16, 64, True, True, True, HELD),
        ("gru", torch.bfloat16, 768, True, False, True, STREAMED),
    ],
)
def test_compiles_without_spills(chip, cell, dtype, size, mask, packed, reverse, path):
    launch(cell, dtype, (2, 4, 1 if size > 128 else 2, size), mask, packed, reverse)
    check_compiled(chip, path, spilled(cell, dtype, size))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [16, 19, 48, 64, 128, 768])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
def test_every_combination_compiles_without_spills(chip, cell, size):
    for dtype in (torch.float32, torch.bfloat16):
        for mask, packed, reverse in itertools.product(*[[False, True]] * 3):
            if mask == packed:
                launch(cell, dtype, (2, 4, 1 if size > 128 else 2, size), mask, packed, reverse)
        compiled = kernels_for(chip)
        check_compiled(chip, [k for k in HELD + STREAMED if compiled[k.__name__]], spilled(cell, dtype, size))
        for kernel in HELD + STREAMED:
            kernel.device_caches.pop(chip, None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_other_lengths_batches_and_heads_compile_nothing_new(chip, packed, monkeypatch):
    for kernels, room in ((HELD, 10**6), (STREAMED, 0)):
        monkeypatch.setattr(backend, "_chip", lambda device, room=room: (room, False))
        for shape in [(2, 64, 2), (2, 1, 2), (16, 16, 1), (3, 20, 16), (1, 17, 3), (33, 3, 1)]:
            launch("lstm", torch.bfloat16, (*shape, 16), mask=True, packed=packed)
            counts = {name: len(compiled) for name, compiled in kernels_for(chip).items()}
            assert [counts[kernel.__name__] for kernel in kernels] == [1, 1, 1], (shape, counts)


# On a GPU, through the operator.


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("heads, size", [(3, 19), (2, 64)])
    @pytest.mark.parametrize("reverse", [False, True])
    def test_all_at_once(self, cell, heads, size, reverse, path):
        arguments = make(cell, 19, 137, heads, size, device="cuda", strided=True)
        states, mask = make_states(cell, 19, heads * size, "cuda"), shared.padding(19, 137, "cuda")
        check(errors(run_op, cell, *arguments, states, mask, None, reverse))

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("reverse", [False, True])
    def test_packed(self, cell, reverse, path):
        cu_seqlens = torch.tensor([0, 9, 9, 10, 137, 137], device="cuda")
        states = make_states(cell, 5, 120, "cuda")
        check(errors(run_op, cell, *make(cell, 1, 137, 3, 40, device="cuda"), states, None, cu_seqlens, reverse))

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
    @pytest.mark.parametrize("heads, size", [(3, 64), (2, 128), (1, 300)])
    @pytest.mark.parametrize("cell", CELLS)
    def test_half_precision(self, cell, heads, size, dtype, tolerance):
        arguments = make(cell, 5, 100, heads, size, dtype, "cuda", strided=True)
        check(errors(run_op, cell, *arguments, mask=shared.padding(5, 100, "cuda")), tolerance, tolerance)

    def test_many_steps_of_a_dense_layer_are_the_same_every_time(self):
        """Streamed steps hand their states on through memory: a missing barrier would show as chance."""
        arguments = ("lstm", *make("lstm", 64, 300, 1, 512, torch.bfloat16, "cuda"), [], None, None)
        results = []
        for _ in range(3):
            h, others, last = op.scan(*arguments, True, [], False)
            results.append([h, others, last, *op.scan_backward(*arguments, h, others, h, last, False)[::3]])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)
