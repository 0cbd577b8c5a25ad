"""The Triton backend: compilation for three GPUs without having one, values on a GPU. Values in Triton's interpreter:
`ops/interpreted`.
"""

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

import hf_rnn_kernels
from hf_rnn_kernels.gated_scan import op, reference

triton = pytest.importorskip("triton")
from hf_rnn_kernels.gated_scan import triton as backend  # noqa: E402

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

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


def errors(run, gates, inputs, h0=None, mask=None, cu_seqlens=None, reverse=False):
    """Relative errors of h, the last states, the inputs' gradients and the initial states' gradient."""
    sequences = inputs[0].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = inputs[0].new_zeros(sequences, inputs[0].shape[2]) if h0 is None else h0
    leaves = [x.detach().cpu().double().requires_grad_() for x in [*inputs, state]]
    on_cpu = [x if x is None else x.cpu() for x in (mask, cu_seqlens)]
    expected = reference.scan(gates, leaves[:-1], leaves[-1], *on_cpu, reverse)
    expected = [expected[0], expected[1].double()]
    cotangents = [torch.randn_like(x) for x in expected]
    cotangents[0] = cotangents[0].to(inputs[0].dtype).double()
    expected += torch.autograd.grad(expected, leaves, cotangents)
    device = inputs[0].device
    grads = cotangents[0].to(device, inputs[0].dtype), cotangents[1].float().to(device)
    actual = run(gates, inputs, h0, mask, cu_seqlens, *grads, reverse)
    names = ["h", "last", *[f"grad {i}" for i in range(len(inputs))], "grad h0"]
    assert len(actual) == len(expected) == len(names)
    for x, ref in zip(actual, expected, strict=True):
        assert x.shape == ref.shape
    assert [x.dtype for x in actual] == [inputs[0].dtype, torch.float32, *[x.dtype for x in inputs], torch.float32]
    pairs = [(x.cpu().double(), ref) for x, ref in zip(actual, expected, strict=True)]
    return {n: ((x - r).norm() / r.norm().clamp_min(1e-30)).item() for n, (x, r) in zip(names, pairs, strict=True)}


def run_backend(gates, inputs, h0, mask, cu_seqlens, grad, grad_last, reverse=False):
    h, last = backend.scan(gates, inputs, h0, mask, cu_seqlens, reverse)
    grads, grad_h0 = backend.scan_backward(gates, inputs, h0, mask, cu_seqlens, h, grad, grad_last, reverse)
    return h, last, *grads.unbind(2), grad_h0


def run_op(gates, inputs, h0, mask, cu_seqlens, grad, grad_last, reverse=False):
    sequences = inputs[0].shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = torch.zeros(sequences, inputs[0].shape[2], device=grad.device) if h0 is None else h0.clone()
    inputs = [x.detach().requires_grad_() for x in inputs]
    h, last = op.scan(gates, inputs, state.requires_grad_(), mask, cu_seqlens, reverse)
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


# Compilation. A driver that launches nothing makes the backend's own host code compile for a GPU that is not there.

TARGETS = {
    "sm_80": (("cuda", 80, 32), 163 * 1024),
    "sm_90": (("cuda", 90, 32), 227 * 1024),
    "gfx942": (("hip", "gfx942", 64), 64 * 1024),
}


@pytest.fixture
def target(request):
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
    triton.runtime.driver.set_active(driver)
    yield name
    triton.runtime.driver.set_active(None)  # the default one, when it is asked for
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


def launch(gates, dtype=torch.float32, shape=(2, 64, 128), mask=False, packed=False, reverse=False):
    inputs = make(gates, (1, *shape[1:]) if packed else shape, dtype)
    batch, time, _ = inputs[0].shape
    cu_seqlens = torch.tensor([0, 5, time]) if packed else None
    mask = torch.ones(batch, time, dtype=torch.bool) if mask else None
    h, last = backend.scan(gates, inputs, None, mask, cu_seqlens, reverse)
    backend.scan_backward(gates, inputs, None, mask, cu_seqlens, h, h, last, reverse)


def check_compiled(target, spilled=0):
    for name, kernels in compiled_for(target).items():
        for kernel in kernels:
            assert kernel.metadata.shared <= TARGETS[target][1], name
            found = spills(kernel)
            assert found and max(found.values()) <= spilled, (name, found)


@pytest.mark.parametrize("target", TARGETS, indirect=True)
@pytest.mark.parametrize(
    "gates, dtype, mask, packed, reverse",
    [
        ("min_gru+g", torch.bfloat16, False, False, False),
        ("min_lstm+g+normalize", torch.float32, True, True, False),
        ("min_lstm+g+normalize", torch.float32, True, True, True),
    ],
)
def test_compiles_without_spills(target, gates, dtype, mask, packed, reverse, monkeypatch):
    monkeypatch.setattr(backend, "WARPS", 10**6)
    monkeypatch.setattr(backend, "SHORTEST", 8)
    launch(gates, dtype, mask=mask, packed=packed, reverse=reverse)
    assert all(compiled_for(target).values())
    check_compiled(target)


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
