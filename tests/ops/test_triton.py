"""The Triton backend: values in Triton's interpreter, compilation for three GPUs without having one, values on a GPU.

The interpreter must be chosen before the kernels are imported, so its tests run in a process of their own, started by
`test_values_in_the_interpreter`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_rnn_kernels
from hf_rnn_kernels.gated_scan import op, reference

triton = pytest.importorskip("triton")
from hf_rnn_kernels.gated_scan import triton as backend  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="part of test_values_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="compiles")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")]

GATES = ["linear", "min_gru", "min_gru+g", "min_lstm", "min_lstm+g", "min_lstm+normalize", "min_lstm+g+normalize"]
KERNELS = [backend._forward, backend._backward, backend._aggregate, backend._chain]


def make(gates, shape, dtype=torch.float32, device="cpu", strided=False, bias=0.0):
    """Inputs: pieces of one projection if `strided`; decays of both signs for the linear recurrence."""
    torch.manual_seed(0)
    batch, time, channels = shape
    count = 3 if gates.startswith("min_lstm") else 2
    x = torch.randn(batch, time, count * channels) if strided else torch.randn(count, batch, time, channels)
    inputs = list(x.chunk(count, -1)) if strided else list(x)
    if gates == "linear":
        inputs[0].copy_(torch.rand(shape) * 1.5 - 0.5)
    inputs[0] += bias
    whole = x.to(device, dtype)
    return list(whole.chunk(count, -1)) if strided else list(whole)


def errors(run, gates, inputs, h0=None, mask=None, cu_seqlens=None):
    """Relative errors of h, the last states, the inputs' gradients and the initial states' gradient."""
    sequences = inputs[0].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = inputs[0].new_zeros(sequences, inputs[0].shape[2]) if h0 is None else h0
    leaves = [x.detach().cpu().double().requires_grad_() for x in [*inputs, state]]
    on_cpu = [x if x is None else x.cpu() for x in (mask, cu_seqlens)]
    expected = reference.scan(gates, leaves[:-1], leaves[-1], *on_cpu)
    expected = [expected[0], expected[1].double()]
    cotangents = [torch.randn_like(x) for x in expected]
    cotangents[0] = cotangents[0].to(inputs[0].dtype).double()
    expected += torch.autograd.grad(expected, leaves, cotangents)
    device = inputs[0].device
    actual = run(
        gates, inputs, h0, mask, cu_seqlens, cotangents[0].to(device, inputs[0].dtype), cotangents[1].float().to(device)
    )
    names = ["h", "last", *[f"grad {i}" for i in range(len(inputs))], "grad h0"]
    assert len(actual) == len(expected) == len(names)
    for x, ref in zip(actual, expected, strict=True):
        assert x.shape == ref.shape
    assert [x.dtype for x in actual] == [inputs[0].dtype, torch.float32, *[x.dtype for x in inputs], torch.float32]
    pairs = [(x.cpu().double(), ref) for x, ref in zip(actual, expected, strict=True)]
    return {n: ((x - r).norm() / r.norm().clamp_min(1e-30)).item() for n, (x, r) in zip(names, pairs, strict=True)}


def run_backend(gates, inputs, h0, mask, cu_seqlens, grad, grad_last):
    h, last = backend.scan(gates, inputs, h0, mask, cu_seqlens)
    grads, grad_h0 = backend.scan_backward(gates, inputs, h0, mask, cu_seqlens, h, grad, grad_last)
    return h, last, *grads.unbind(2), grad_h0


def run_op(gates, inputs, h0, mask, cu_seqlens, grad, grad_last):
    sequences = inputs[0].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = torch.zeros(sequences, inputs[0].shape[2], device=grad.device) if h0 is None else h0.clone()
    inputs = [x.detach().requires_grad_() for x in inputs]
    h, last = op.scan(gates, inputs, state.requires_grad_(), mask, cu_seqlens)
    return h, last, *torch.autograd.grad([h, last], [*inputs, state], [grad, grad_last])


def check(result, forward=1e-6, backward=1e-5):
    for name, error in result.items():
        assert error <= (forward if name in ("h", "last") else backward), result  # NaN fails, too


def padding(batch, time, device="cpu"):
    """A mask with padding on the left, on the right and in between, and one sequence of padding only."""
    mask = torch.rand(batch, time, device=device) < 0.7
    mask[0, : time // 3] = False
    mask[-1] = False
    return mask


@pytest.fixture(params=["one pass", "chunks"])
def chunks(request, monkeypatch):
    """How time is cut, whatever the GPU: not at all, or into chunks of 8 rows."""
    monkeypatch.setattr(backend, "WARPS", 0 if request.param == "one pass" else 10**6)
    monkeypatch.setattr(backend, "SHORTEST", 8)


@pytest.fixture
def quick(monkeypatch):
    """The interpreter takes half a millisecond to enter a function and scans element by element: enter only kernels,
    and let the chain have small tiles (several of them, too)."""
    monkeypatch.setattr(backend, "CHAIN_BT", 2)
    monkeypatch.setattr(backend, "CHAIN_BD", 32)
    for name, value in list(vars(backend).items()):
        if type(value).__name__ == "InterpretedFunction" and value not in KERNELS:
            value.fn.fn = value.fn  # as tl.associative_scan asks for it
            monkeypatch.setattr(backend, name, value.fn)


@pytest.fixture
def reverse(monkeypatch):
    """Programs run from the last to the first: a kernel that leans on their order fails here, whatever the GPU does."""
    builder = triton.runtime.interpreter.interpreter_builder
    set_index = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_index(builder.grid_dim[0] - 1 - x, y, z))


@pytest.fixture
def poison(monkeypatch):
    """Uninitialised memory is NaN: what a kernel does not write shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


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
@pytest.mark.usefixtures("chunks", "poison", "quick", "reverse")
class TestInterpreted:
    @pytest.mark.parametrize("gates", GATES)
    def test_all_at_once(self, gates):
        """Strided inputs, initial states, padding."""
        inputs = make(gates, (2, 21, 19), strided=True)
        check(errors(run_backend, gates, inputs, torch.randn(2, 19), padding(2, 21)))

    @pytest.mark.parametrize("gates, dtype", [("linear", torch.int64), ("min_gru+g", torch.int32)])
    def test_packed(self, gates, dtype):
        """Sequences of 9, 0, 1, 27 and 0 rows, with padding."""
        cu_seqlens = torch.tensor([0, 9, 9, 10, 37, 37], dtype=dtype)
        inputs = make(gates, (1, 37, 5))
        check(errors(run_backend, gates, inputs, torch.randn(5, 5), padding(2, 37)[:1], cu_seqlens))

    @pytest.mark.parametrize("shape", [(2, 1, 3), (1, 9, 1), (1, 17, 130), (1, 16, 128)])
    def test_shapes(self, shape):
        check(errors(run_backend, "min_gru+g", make("min_gru+g", shape)))

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
    def test_half_precision(self, dtype, tolerance):
        inputs = make("min_lstm+g", (1, 18, 7), dtype, strided=True)
        check(errors(run_backend, "min_lstm+g", inputs, torch.randn(1, 7)), tolerance, tolerance)

    def test_layouts(self):
        """Transposed, expanded and sliced inputs and gradients are read as what they are."""
        x = torch.randn(5, 11, 2)
        inputs = [x.permute(2, 1, 0), torch.randn(2, 13, 5)[:, 1:12]]
        check(errors(run_backend, "min_gru", inputs))
        h, last = backend.scan("min_gru", inputs)
        whole, one = torch.ones(2, 11, 5), torch.ones(1, 1, 1).expand(2, 11, 5)
        arguments = ("min_gru", inputs, None, None, None, h)
        for a, b in zip(
            backend.scan_backward(*arguments, whole, last), backend.scan_backward(*arguments, one, last), strict=True
        ):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        "gates, time",
        [("min_gru", 200), *[pytest.param(gates, 2000, marks=pytest.mark.exhaustive) for gates in GATES[1::2]]],
    )
    @pytest.mark.timeout(900)
    def test_slow_gates(self, gates, time):
        """Memory of 3,000 steps. Gates are constant, so that rounding keep = 1 - 3e-4 would not average out."""
        inputs = make(gates, (1, time, 3))
        inputs[0].fill_(-8.0 if "gru" in gates else 8.0)
        check(errors(run_backend, gates, inputs, torch.randn(1, 3)))

    @pytest.mark.parametrize("gates", ["min_gru+g", "min_lstm", "min_lstm+g+normalize"])
    def test_wide_open_gates(self, gates):
        """keep is 3e-4: what is left of a gradient must come from keep, not from 1 - 0.9997."""
        inputs = make(gates, (1, 2, 5), bias=8.0)
        if gates == "min_lstm":  # its forget gate keeps when open
            inputs[0] = inputs[0] - 16
        check(errors(run_backend, gates, inputs, torch.randn(1, 5)))

    @pytest.mark.parametrize("gates", GATES[1:])
    def test_extreme_inputs_stay_finite(self, gates):
        """All pairs of extreme gates, one in each channel, with candidates that jump from one end to the other."""
        values = torch.tensor([-3e38, -1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, 3e38])
        x, y = values.repeat(9).expand(1, 3, 81), values.repeat_interleave(9).expand(1, 3, 81)
        size = 1.0 if gates in ("min_lstm", "min_lstm+g") else 3e38  # f + i > 1 may overflow in exact arithmetic, too
        candidate = torch.tensor([-size, size, -size])[None, :, None].expand(1, 3, 81)
        inputs = [x, candidate] if "gru" in gates else [x, y, candidate]
        h, last = backend.scan(gates, inputs)
        assert h.isfinite().all() and last.isfinite().all()
        unit = [*inputs[:-1], inputs[-1].sign()]
        h, last = backend.scan(gates, unit)
        grads, grad_h0 = backend.scan_backward(gates, unit, None, None, None, h, torch.ones_like(h), last)
        assert grads.isfinite().all() and grad_h0.isfinite().all()

    def test_nan_is_not_hidden_and_padding_is_not_read(self):
        inputs = make("min_gru+g", (2, 12, 3))
        inputs[0][0, 5] = float("nan")
        assert backend.scan("min_gru+g", inputs)[0][0, 5:].isnan().all()
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[0, 5] = False
        h, last = backend.scan("min_gru+g", inputs, None, mask)
        grads, grad_h0 = backend.scan_backward("min_gru+g", inputs, None, mask, None, h, torch.ones_like(h), last)
        for x in (h, last, grads, grad_h0):
            assert x.isfinite().all()
        assert torch.equal(h[0, 5], h[0, 4])

    def test_wrong_offsets_read_and_write_inside(self):
        """Under torch.compile offsets are not checked; those beyond the rows are cut off."""
        inputs = make("min_gru+g", (1, 12, 3))
        h, _ = backend.scan("min_gru+g", inputs, None, None, torch.tensor([-50, 5, 10**9]))
        assert torch.equal(h[:, 5:], backend.scan("min_gru+g", [x[:, 5:] for x in inputs])[0])


@interpreted
@pytest.mark.usefixtures("quick")
def test_interpreted_padding_and_packing_change_no_bit():
    inputs = make("min_lstm+g", (1, 24, 3))
    h, last = backend.scan("min_lstm+g", [x[:, 5:19] for x in inputs])
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[:, 5:19] = True
    padded, padded_last = backend.scan("min_lstm+g", inputs, None, mask)
    packed, packed_last = backend.scan("min_lstm+g", inputs, None, None, torch.tensor([0, 5, 19, 24]))
    assert torch.equal(padded[:, 5:19], h) and torch.equal(packed[:, 5:19], h)
    assert torch.equal(padded_last, last) and torch.equal(packed_last[1:2], last)


# Compilation. A driver that launches nothing makes the backend's own host code compile for a GPU that is not there.

TARGETS = {
    "sm_80": (("cuda", 80, 32), 163 * 1024),
    "sm_90": (("cuda", 90, 32), 227 * 1024),
    "gfx942": (("hip", "gfx942", 64), 64 * 1024),
}


@pytest.fixture
def target(request, monkeypatch):
    name = request.param
    (kind, arch, lanes), shared = TARGETS[name]
    driver = SimpleNamespace(
        get_current_device=lambda: name,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: triton.backends.compiler.GPUTarget(kind, arch, lanes),
        launcher_cls=lambda src, metadata: lambda *arguments: None,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            load_binary=lambda *arguments: (None, None, 0, 0, 1024),
        ),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    yield name
    for kernel in KERNELS:
        kernel.device_caches.pop(name, None)


def compiled_for(target):
    return {kernel.__name__: list(kernel.device_caches[target][0].values()) for kernel in KERNELS}


def spills(kernel) -> dict[str, int]:
    if "amdgcn" in kernel.asm:
        return {k: int(v) for k, v in re.findall(r"\.([sv]gpr_spill_count):\s*(\d+)", kernel.asm["amdgcn"])}
    (arch,) = re.findall(r"\.target (sm_\w+)", kernel.asm["ptx"])
    ptxas = triton.knobs.nvidia.ptxas.path
    # with Triton's own options
    command = [ptxas, "-v", "--regAllocOptLevel=2", "-lineinfo", "-arch", arch, "-o", "/dev/null", "/dev/stdin"]
    log = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr
    return {k: int(v) for v, k in re.findall(r"(\d+) bytes (spill \w+)", log)}


def launch(gates, dtype=torch.float32, shape=(2, 64, 128), mask=False, packed=False):
    inputs = make(gates, (1, *shape[1:]) if packed else shape, dtype)
    batch, time, _ = inputs[0].shape
    cu_seqlens = torch.tensor([0, 5, time]) if packed else None
    mask = torch.ones(batch, time, dtype=torch.bool) if mask else None
    h, last = backend.scan(gates, inputs, None, mask, cu_seqlens)
    backend.scan_backward(gates, inputs, None, mask, cu_seqlens, h, h, last)


def check_compiled(target, spilled=0):
    for name, kernels in compiled_for(target).items():
        for kernel in kernels:
            assert kernel.metadata.shared <= TARGETS[target][1], name
            found = spills(kernel)
            assert found and max(found.values()) <= spilled, (name, found)


@compiled
@pytest.mark.parametrize("target", TARGETS, indirect=True)
@pytest.mark.parametrize(
    "gates, dtype, mask, packed",
    [("min_gru+g", torch.bfloat16, False, False), ("min_lstm+g+normalize", torch.float32, True, True)],
)
def test_compiles_without_spills(target, gates, dtype, mask, packed, monkeypatch):
    monkeypatch.setattr(backend, "WARPS", 10**6)
    monkeypatch.setattr(backend, "SHORTEST", 8)
    launch(gates, dtype, mask=mask, packed=packed)
    assert all(compiled_for(target).values())
    check_compiled(target)


@compiled
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("channels", [128, 51])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_every_combination_compiles_without_spills(target, gates, channels, monkeypatch):
    """51 channels, divisible by nothing, are loaded one by one; there ptxas gives up to 4 registers for occupancy."""
    monkeypatch.setattr(backend, "WARPS", 10**6)
    monkeypatch.setattr(backend, "SHORTEST", 8)
    for dtype in (torch.float32, torch.bfloat16):
        for mask in (False, True):
            for packed in (False, True):
                launch(gates, dtype, (2, 64, channels), mask, packed)
    check_compiled(target, spilled=0 if channels == 128 else 16)


@compiled
@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_lengths_and_batches_compile_nothing_new(target, monkeypatch):
    monkeypatch.setattr(backend, "SHORTEST", 8)
    counts = []
    for warps in (0, 10**6):  # one pass, chunks
        monkeypatch.setattr(backend, "WARPS", warps)
        for batch, time in [(2, 64), (1, 64), (16, 64), (3, 100), (1, 17), (16, 256), (5, 33)]:
            launch("min_gru+g", torch.bfloat16, (batch, time, 48), mask=True)
            counts.append({name: len(kernels) for name, kernels in compiled_for(target).items()})
    once = {"_forward": 1, "_backward": 1}
    assert counts[:7] == [{**once, "_aggregate": 0, "_chain": 0}] * 7
    assert counts[7:] == [{**once, "_aggregate": 2, "_chain": 1}] * 7  # aggregates of both directions


@compiled
def test_chunks_fill_the_gpu_and_cover_time():
    for time in (1, 2, 63, 64, 65, 127, 128, 1000, 4096, 65536, 1_000_000):
        for warps in (1, 3, 64, 500, 1000, 5000):
            length, count = backend._chunks(time, warps, 132)
            assert (count - 1) * length < time <= count * length
            assert count == 1 or (length >= backend.SHORTEST and warps * count <= 2 * backend.WARPS * 132)
    assert backend._chunks(4096, 8 * 1024 // 128, 132)[1] > 1
    assert backend._chunks(1_000_000, 8, 132)[1] >= 150
    assert backend._chunks(4096, 1100, 132) == (4096, 1)


# On a GPU, through the operator.


@pytest.mark.usefixtures("chunks")
class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("gates", GATES)
    def test_all_at_once(self, gates):
        inputs = make(gates, (3, 337, 150), device="cuda", strided=True)
        check(errors(run_op, gates, inputs, torch.randn(3, 150, device="cuda"), padding(3, 337, "cuda")))

    @pytest.mark.parametrize("gates", GATES)
    def test_packed(self, gates):
        cu_seqlens = torch.tensor([0, 9, 9, 10, 137, 137], device="cuda")
        check(errors(run_op, gates, make(gates, (1, 137, 70), device="cuda"), None, None, cu_seqlens))

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
    @pytest.mark.parametrize("gates", GATES)
    def test_half_precision(self, gates, dtype, tolerance):
        check(errors(run_op, gates, make(gates, (2, 100, 256), dtype, "cuda", strided=True)), tolerance, tolerance)


class TestGPUSizes:
    pytestmark = gpu

    def test_slow_gates_over_65536_steps(self):
        inputs = make("min_gru+g", (1, 65536, 8), device="cuda", bias=-8.0)
        check(errors(run_op, "min_gru+g", inputs, torch.randn(1, 8, device="cuda")))

    def test_one_long_sequence(self):
        """A million steps: against the backend itself, cut by hand into two calls."""
        inputs = make("min_gru+g", (1, 1_000_000, 64), device="cuda")
        h, last = hf_rnn_kernels.min_gru_scan(*inputs)
        _, middle = hf_rnn_kernels.min_gru_scan(*[x[:, :300_001] for x in inputs])
        rest, end = hf_rnn_kernels.min_gru_scan(*[x[:, 300_001:] for x in inputs], middle)
        torch.testing.assert_close(h[:, 300_001:], rest, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)

    def test_more_than_2_to_the_31_elements(self):
        if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
            pytest.skip("needs 40 GiB")
        projection = torch.randn(1, 2**20 + 64, 2 * 1024 + 128, device="cuda", dtype=torch.bfloat16)
        gate, candidate = projection[..., :1024], projection[..., 1024:2048]
        h, last = hf_rnn_kernels.min_gru_scan(gate, candidate)
        end, _ = hf_rnn_kernels.min_gru_scan(gate[:, -512:], candidate[:, -512:])
        torch.testing.assert_close(h[:, -64:], end[:, -64:])
        assert last.isfinite().all()

    def test_lengths_and_batches_compile_nothing_new(self):
        def run(batch, time):
            x = torch.randn(batch, time, 2 * 96, device="cuda", requires_grad=True)
            hf_rnn_kernels.min_gru_scan(*x.chunk(2, -1))[0].sum().backward()

        run(2, 64), run(1, 4096)  # one pass, chunks
        device = torch.cuda.current_device()
        counts = [len(kernel.device_caches[device][0]) for kernel in KERNELS]
        for batch, time in [(1, 2), (3, 100), (16, 256), (1, 8192), (64, 33), (2, 10_000)]:
            run(batch, time)
        assert counts == [len(kernel.device_caches[device][0]) for kernel in KERNELS]
