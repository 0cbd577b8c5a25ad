"""The Triton backend of recurrent_scan, tested as that of gated_scan is in `test_triton.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_rnn_kernels.recurrent_scan import op, reference

triton = pytest.importorskip("triton")
from ops import test_triton as shared  # noqa: E402
from triton import language as tl  # noqa: E402

from hf_rnn_kernels.recurrent_scan import triton as backend  # noqa: E402
from hf_rnn_kernels.recurrent_scan import triton_tiles  # noqa: E402

compiled, gpu, interpreted = shared.compiled, shared.gpu, shared.interpreted
poison, reverse, target = shared.poison, shared.reverse, shared.target

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


def errors(run, cell, x, weight, bias, states=(), mask=None, cu_seqlens=None):
    """Relative errors of all results, forward and backward, against the reference in float64."""

    def exact(x):
        return None if x is None else x.cpu().double() if x.is_floating_point() else x.cpu()

    arguments = [*map(exact, (x, weight, bias)), [exact(s) for s in states], exact(mask), exact(cu_seqlens)]
    h, others, last = reference.scan(cell, *arguments, training=True)
    grad, grad_last = torch.randn(h.shape).to(x.dtype), torch.randn(last.shape)
    back = reference.scan_backward(cell, *arguments, h, others, grad.double(), grad_last.double())
    expected = [h, others, last, *back]
    actual = run(cell, x, weight, bias, list(states), mask, cu_seqlens, grad.to(x.device), grad_last.to(x.device))
    dtypes = [x.dtype, torch.float32, torch.float32, x.dtype, weight.dtype, torch.float32, torch.float32]
    result = {}
    for name, a, e, dtype in zip(NAMES, actual, expected, dtypes, strict=True):
        if a is not None:  # what the operator does not show
            assert a.shape == e.shape and a.dtype == dtype, name
            result[name] = ((a.cpu().double() - e).norm() / e.norm().clamp_min(1e-30)).item()
    return result


def run_backend(cell, x, weight, bias, states, mask, cu_seqlens, grad, grad_last):
    arguments = (cell, x, weight, bias, states, mask, cu_seqlens)
    h, others, last = backend.scan(*arguments, True)
    plain = backend.scan(*arguments, False)
    assert torch.equal(plain[0], h) and torch.equal(plain[2], last) and plain[1].shape[2] == 0
    return h, others, last, *backend.scan_backward(*arguments, h, others, grad, grad_last)


def run_op(cell, x, weight, bias, states, mask, cu_seqlens, grad, grad_last):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, *states)]
    h, others, last = op.scan(cell, *leaves[:3], leaves[3:], mask, cu_seqlens, True, [])
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


@pytest.fixture
def quick(monkeypatch):
    """The interpreter takes half a millisecond to enter a function: enter only kernels. Streamed tiles are small."""
    monkeypatch.setattr(backend, "UNITS", 16)
    monkeypatch.setattr(backend, "DEPTH", 32)
    for module in (backend, triton_tiles):
        for name, value in list(vars(module).items()):
            if type(value).__name__ == "InterpretedFunction" and value not in HELD + STREAMED:
                monkeypatch.setattr(module, name, value.fn)


@pytest.fixture
def bfloat16_dot(monkeypatch):
    multiply_bfloat16(monkeypatch)


def multiply_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as its bits, which its `tl.dot` would multiply as integers."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def floats(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return triton.runtime.interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: create_dot(self, floats(a), floats(b), *rest))


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("which", ["not exhaustive", pytest.param("exhaustive", marks=[pytest.mark.exhaustive])])
@pytest.mark.timeout(1800)
def test_values_in_the_interpreter(which):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "interpreted", "-m", which, __file__]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@interpreted
@pytest.mark.usefixtures("bfloat16_dot", "poison", "quick", "reverse")
class TestInterpreted:
    @pytest.mark.parametrize("cell", CELLS)
    def test_all_at_once(self, cell, path):
        """Two heads of an odd size, initial states, strided x, padding on both sides, inside, and nothing else."""
        arguments = make(cell, 3, 7, 2, 19, strided=True)
        check(errors(run_backend, cell, *arguments, make_states(cell, 3, 38), shared.padding(3, 7)))

    @pytest.mark.parametrize("cell, dtype", [("gru", torch.int32), ("lstm", torch.int64)])
    def test_packed(self, cell, dtype, path):
        """Sequences of 4, 0, 1, 6 and 0 rows, with padding."""
        cu_seqlens = torch.tensor([0, 4, 4, 5, 11, 11], dtype=dtype)
        arguments = make(cell, 1, 11, 2, 3)
        check(errors(run_backend, cell, *arguments, make_states(cell, 5, 6), shared.padding(2, 11)[:1], cu_seqlens))

    @pytest.mark.parametrize("cell, heads, size", [("lstm", 1, 40), ("gru", 3, 16), ("gru", 1, 1)])
    def test_sizes(self, cell, heads, size, path):
        x, weight, _ = make(cell, 1, 3, heads, size)
        check(errors(run_backend, cell, x, weight, None))

    @pytest.mark.parametrize("cell", CELLS)
    def test_many_sequences(self, cell):
        check(errors(run_backend, cell, *make(cell, 35, 2, 1, 3), make_states(cell, 35, 3)))

    @pytest.mark.parametrize("programs", [4, 1])
    def test_gates_are_computed_again_by_any_number_of_programs(self, programs, monkeypatch):
        monkeypatch.setattr(backend, "PROGRAMS", programs)
        monkeypatch.setattr(backend, "STEPS", 1)
        check(errors(run_backend, "gru", *make("gru", 2, 6, 1, 3)))

    @pytest.mark.exhaustive
    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("size", [3, 16, 19, 40])
    @pytest.mark.parametrize("heads", [1, 3])
    @pytest.mark.parametrize("cell", CELLS)
    def test_every_combination(self, cell, heads, size, masked, packed, path):
        cu_seqlens = torch.tensor([0, 0, 9, 10, 10, 18]) if packed else None
        arguments = make(cell, *((1, 18) if packed else (2, 9)), heads, size)
        states = make_states(cell, 5 if packed else 2, heads * size)
        mask = shared.padding(2, 9) if masked else None
        mask = mask.reshape(1, 18) if masked and packed else mask
        check(errors(run_backend, cell, *arguments, states, mask, cu_seqlens))

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
    @pytest.mark.parametrize("cell", CELLS)
    def test_half_precision(self, cell, dtype, tolerance, path):
        arguments = make(cell, 2, 5, 1, 19, dtype)
        check(errors(run_backend, cell, *arguments, make_states(cell, 2, 19)), tolerance, tolerance)

    def test_autocast(self):
        """x in bfloat16, all else in float32."""
        x, weight, bias = make("lstm", 2, 5, 1, 19)
        check(errors(run_backend, "lstm", x.bfloat16(), weight, bias, make_states("lstm", 2, 19)), 1e-2, 1e-2)

    @pytest.mark.parametrize("cell", CELLS)
    def test_layouts(self, cell):
        """Transposed, expanded and sliced inputs and gradients are read as what they are."""
        x, weight, bias = make(cell, 2, 4, 1, 5)
        states, wide = make_states(cell, 2, 10), torch.randn(2, 9, 5)
        skewed = [weight.mT.contiguous().mT, bias.repeat_interleave(2)[::2], [s[:, ::2] for s in states]]
        whole = [weight, bias, [s.contiguous() for s in skewed[2]]]
        grads = wide[:, 3:7], torch.ones(1, 1, 1).expand(2, 4, 5), wide.mT.contiguous().mT[:, :4]
        for strange_x, grad in zip((x.mT.contiguous().mT, x[:1].expand(2, -1, -1), x), grads, strict=True):
            h, others, last = backend.scan(cell, strange_x, *skewed, None, None, True)
            for a, b in zip(
                backend.scan(cell, strange_x.contiguous(), *whole, None, None, True), (h, others, last), strict=True
            ):
                assert torch.equal(a, b)
            last = last.mT.contiguous().mT
            a = backend.scan_backward(cell, strange_x, *skewed, None, None, h, others, grad, last)
            arguments = (strange_x.contiguous(), *whole, None, None, h, others, grad.contiguous(), last.contiguous())
            for one, other in zip(a, backend.scan_backward(cell, *arguments), strict=True):
                assert torch.equal(one, other)

    def test_tanh_keeps_all_bits(self):
        """A GRU with closed update gates is its candidate."""
        values = torch.cat([torch.logspace(-30, 1.5, 400), torch.linspace(0.4, 0.6, 112)]).view(-1, 16)
        x = torch.stack([values, torch.full_like(values, -1e4), values * torch.tensor([1, -1]).repeat(8)], 1)
        h, _, _ = backend.scan("gru", x.view(1, 32, 48), torch.zeros(1, 48, 16), None, [])
        exact = x[:, 2].double().tanh()
        assert ((h[0] - exact) / exact).abs().max() < 4e-7

    @pytest.mark.parametrize("cell", CELLS)
    def test_tiny_inputs(self, cell, path):
        """Every element of what is tiny, not only the sum of their squares."""
        x, weight, bias = make(cell, 2, 4, 1, 5)
        candidate = (slice(None), slice(None), slice(10, 15))
        x[candidate] = x[candidate].sign() * 1e-12 * torch.rand(2, 4, 5).add(0.5)
        weight, bias = weight.abs() * 1e-3, bias.new_zeros(bias.shape)
        weight = weight * x[0, 0, candidate[2]].sign()  # so that nothing cancels
        x[candidate] = x[candidate].abs() * x[0, 0, candidate[2]].sign()
        exact = reference.scan(cell, x.double(), weight.double(), bias.double(), [])
        for a, b in zip(backend.scan(cell, x, weight, bias, []), exact, strict=True):
            assert a.numel() == 0 or ((a - b) / b).abs().max() < 1e-5

    @pytest.mark.parametrize("cell", CELLS)
    def test_slow_gates(self, cell):
        """Memory of 3,000 steps. Gates are constant, so that rounding keep = 1 - 3e-4 would not average out."""
        x, weight, bias = make(cell, 1, 30, 1, 3)
        x[..., 3:6], bias = 8.0, torch.zeros_like(bias)
        check(errors(run_backend, cell, x, 0 * weight, bias, make_states(cell, 1, 3)))

    def test_equal_terms_are_not_rounded_equally(self, path):
        """Where an sLSTM's forget gate is m, m is a sum of many terms of 3e-4."""
        x, weight, _ = make("slstm", 1, 150, 1, 3)
        x[..., :3], x[..., 3:6] = -5.0, 8.0
        states = [torch.full((1, 3), value) for value in (0.0, 0.0, 1.0, 3.0)]
        exact = reference.scan("slstm", x.double(), 0 * weight.double(), None, [s.double() for s in states])
        _, _, last = backend.scan("slstm", x, 0 * weight, None, states)
        assert (last[3] - exact[2][3]).abs().max() < 3e-7

    @pytest.mark.parametrize("cell", CELLS)
    def test_extreme_inputs_stay_finite(self, cell):
        """All pairs of extreme gates, with candidates that jump from one end to the other."""
        values = torch.tensor([-3e38, -1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, 3e38])
        first, second = values.repeat(9).expand(3, 81), values.repeat_interleave(9).expand(3, 81)
        jumps = torch.tensor([-3e38, 3e38, -3e38])[:, None].expand(3, 81)
        x = torch.cat([first, second, jumps, second][: reference.CELLS[cell].gates], 1)[None]
        weight = torch.randn(1, x.shape[2], 81)
        arguments = (cell, x, weight, None, [], None, None)
        h, others, last = backend.scan(*arguments, True)
        grads = backend.scan_backward(*arguments, h, others, torch.ones_like(h), last.clamp(-1, 1))
        for tensor in (h, others, last, *grads):
            assert tensor.isfinite().all()

    @pytest.mark.parametrize("cell", CELLS)
    def test_nan_is_not_hidden_and_padding_is_not_read(self, cell, path):
        x, weight, bias = make(cell, 2, 6, 1, 3)
        x[0, 3] = float("nan")
        assert backend.scan(cell, x, weight, bias, [])[0][0, 3:].isnan().all()
        mask = torch.ones(2, 6, dtype=torch.bool)
        mask[0, 3] = False
        h, others, last = backend.scan(cell, x, weight, bias, [], mask, None, True)
        grads = backend.scan_backward(cell, x, weight, bias, [], mask, None, h, others, torch.ones_like(h), last)
        for tensor in (h, others, last, *grads):
            assert tensor.isfinite().all()
        assert torch.equal(h[0, 3], h[0, 2])

    def test_wrong_offsets_read_and_write_inside(self, path):
        """Under torch.compile offsets are not checked; those beyond the rows are cut off."""
        x, weight, bias = make("gru", 1, 6, 1, 3)
        h, _, _ = backend.scan("gru", x, weight, bias, [], None, torch.tensor([-50, 2, 10**9]))
        assert torch.equal(h[:, 2:], backend.scan("gru", x[:, 2:], weight, bias, [])[0])


@interpreted
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("cell", CELLS)
def test_interpreted_padding_and_packing_change_no_bit(cell, path):
    x, weight, bias = make(cell, 1, 9, 1, 3)
    h, _, last = backend.scan(cell, x[:, 2:7], weight, bias, [])
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[:, 2:7] = True
    padded, _, padded_last = backend.scan(cell, x, weight, bias, [], mask)
    packed, _, packed_last = backend.scan(cell, x, weight, bias, [], None, torch.tensor([0, 2, 7, 9]))
    assert torch.equal(padded[:, 2:7], h) and torch.equal(packed[:, 2:7], h)
    assert torch.equal(padded_last, last) and torch.equal(packed_last[:, 1:2], last)


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


def launch(cell, dtype=torch.bfloat16, shape=(2, 4, 2, 64), mask=False, packed=False):
    batch, time, heads, size = shape
    x, weight, bias = make(cell, 1 if packed else batch, batch * time if packed else time, heads, size, dtype)
    cu_seqlens = torch.tensor([0, *range(2, batch + 1), batch * time]) if packed else None
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask else None
    arguments = (cell, x, weight, bias, [], mask, cu_seqlens)
    h, others, last = backend.scan(*arguments, True)
    backend.scan_backward(*arguments, h, others, h, last)


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
    return 96 if cell == "slstm" else 32


@compiled
@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
@pytest.mark.parametrize(
    "cell, dtype, size, mask, packed, path",
    [
        ("lstm", torch.bfloat16, 64, True, False, HELD),
        ("gru", torch.float32, 64, False, True, HELD),
        ("lstm", torch.bfloat16, 128, True, True, HELD),
        ("slstm", torch.bfloat16, 64, True, True, HELD),
        ("gru", torch.bfloat16, 768, True, False, STREAMED),
    ],
)
def test_compiles_without_spills(chip, cell, dtype, size, mask, packed, path):
    launch(cell, dtype, (2, 4, 1 if size > 128 else 2, size), mask, packed)
    check_compiled(chip, path, spilled(cell, dtype, size))


@compiled
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [16, 19, 48, 64, 128, 768])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
def test_every_combination_compiles_without_spills(chip, cell, size):
    for dtype in (torch.float32, torch.bfloat16):
        for mask, packed in ((False, False), (True, True)):
            launch(cell, dtype, (2, 4, 1 if size > 128 else 2, size), mask, packed)
        compiled = kernels_for(chip)
        check_compiled(chip, [k for k in HELD + STREAMED if compiled[k.__name__]], spilled(cell, dtype, size))
        for kernel in HELD + STREAMED:
            kernel.device_caches.pop(chip, None)


@compiled
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
    def test_all_at_once(self, cell, heads, size, path):
        arguments = make(cell, 19, 137, heads, size, device="cuda", strided=True)
        states, mask = make_states(cell, 19, heads * size, "cuda"), shared.padding(19, 137, "cuda")
        check(errors(run_op, cell, *arguments, states, mask))

    @pytest.mark.parametrize("cell", CELLS)
    def test_packed(self, cell, path):
        cu_seqlens = torch.tensor([0, 9, 9, 10, 137, 137], device="cuda")
        states = make_states(cell, 5, 120, "cuda")
        check(errors(run_op, cell, *make(cell, 1, 137, 3, 40, device="cuda"), states, None, cu_seqlens))

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
            h, others, last = op.scan(*arguments, True, [])
            results.append([h, others, last, *op.scan_backward(*arguments, h, others, h, last)[::3]])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)
