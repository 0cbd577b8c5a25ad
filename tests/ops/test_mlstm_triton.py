"""The Triton backend of mlstm_scan, tested as that of gated_scan is in `test_triton.py`."""

import pytest
import torch

from hf_rnn_kernels.mlstm_scan import op, reference

triton = pytest.importorskip("triton")
from ops import test_triton as shared  # noqa: E402

from hf_rnn_kernels.mlstm_scan import triton as backend  # noqa: E402
from hf_rnn_kernels.mlstm_scan import triton_backward, triton_chunks, triton_step  # noqa: E402

gpu, target = shared.gpu, shared.target

FORWARD = [triton_chunks._gates, triton_chunks._states, backend._outputs]
BACKWARD = [getattr(triton_backward, f"_{n}") for n in ("normalizers", "states_back", "grad_q", "grad_k", "grad_v")]
BACKWARD += [triton_backward._grad_gates]
KERNELS = [*FORWARD, *BACKWARD, triton_step._step_gates, triton_step._step_memory]
NAMES = ["h", "a", "m", "last C", "last n", "last m"]
NAMES += [f"grad {name}" for name in ("q", "k", "v", "i", "f", "C", "n", "m")]


def make(batch, time, heads, keys, values, dtype=torch.float32, device="cpu", skip=3):
    """q, k, v, slices of one projection but for what they skip, and i and f, of another in float32, as in autocast."""
    torch.manual_seed(0)
    widths = [heads * keys, heads * keys, heads * values]
    x, gates = torch.randn(batch, time, sum(widths) + skip), torch.randn(batch, time, 2 * heads)
    q, k, v = x.to(device, dtype)[..., skip:].split(widths, -1)
    return [x.unflatten(2, (heads, -1)) for x in (q, k, v)] + list(gates.to(device).chunk(2, -1))


def make_states(sequences, q, v):
    heads, keys, values = *q.shape[2:], v.shape[3]
    shapes = [(sequences, heads, keys, values), (sequences, heads, keys), (sequences, heads)]
    return [torch.randn(shape, device=q.device) for shape in shapes]


def errors(run, inputs, states=(), mask=None, cu_seqlens=None, eps=1e-6, reverse=False):
    """Relative errors of all results, forward and backward, against the reference in float64."""

    def exact(x):
        return None if x is None else x.cpu().double() if x.is_floating_point() else x.cpu()

    arguments = [*map(exact, inputs), [exact(s) for s in states], exact(mask), exact(cu_seqlens), eps]
    h, norms, *last = reference.scan(*arguments, True, reverse)
    grad, grad_last = torch.randn(h.shape).to(inputs[0].dtype), [torch.randn(s.shape) for s in last if states]
    back = reference.scan_backward(*arguments, h, norms, grad.double(), [g.double() for g in grad_last], reverse)
    expected = [h, *norms.unbind(3), *last, *back]
    if mask is not None:  # what padding holds is nothing
        padding = ~mask.bool()
        inputs = [x.masked_fill(padding[(...,) + (None,) * (x.dim() - 2)], torch.nan) for x in inputs]
        grad = grad.to(h.device).masked_fill(padding.cpu()[..., None, None], torch.nan)
    device = inputs[0].device
    grads = grad.to(device), [g.to(device) for g in grad_last]
    actual = run(inputs, list(states), mask, cu_seqlens, eps, *grads, reverse)
    dtypes = [inputs[0].dtype, *[torch.float32] * 5, *[x.dtype for x in inputs], *[torch.float32] * 3]
    result = {}
    for name, a, e, dtype in zip(NAMES, actual, expected, dtypes, strict=True):
        if a is not None:  # what the operator does not show
            assert a.shape == e.shape and a.dtype == dtype, name
            result[name] = ((a.cpu().double() - e).norm() / e.norm().clamp_min(1e-30)).item()
    return result


def run_backend(inputs, states, mask, cu_seqlens, eps, grad, grad_last, reverse=False):
    arguments = (*inputs, states, mask, cu_seqlens, eps)
    h, norms, *last = backend.scan(*arguments, True, reverse)
    return h, *norms.unbind(3), *last, *backend.scan_backward(*arguments, h, norms, grad, grad_last, reverse)


def run_op(inputs, states, mask, cu_seqlens, eps, grad, grad_last, reverse=False):
    leaves = [x.detach().requires_grad_() for x in (*inputs, *states)]
    h, norms, *last = op.scan(*leaves[:5], leaves[5:], mask, cu_seqlens, eps, True, reverse)
    grads = torch.autograd.grad([h, *last[: len(grad_last)]], leaves, [grad, *grad_last])
    return h, *norms.unbind(3), *last, *grads, *[None] * (8 - len(grads))


def check(result, forward=2e-6, backward=1e-5):
    for name, error in result.items():
        assert error <= (backward if name.startswith("grad") else forward), result  # NaN fails, too


# Compilation, by the driver of `test_triton.py`, which launches nothing.


@pytest.fixture
def chip(target, monkeypatch):
    """The GPU that is not there, also for the choice of tiles."""
    monkeypatch.setattr(triton_chunks, "_is_amd", lambda device: target.startswith("gfx"))
    yield target
    for kernel in KERNELS:
        kernel.device_caches.pop(target, None)


def launch(dtype=torch.bfloat16, shape=(2, 4, 2), sizes=(64, 64), full=False, reverse=False):
    """Both directions, padded, packed and with initial states if `full`."""
    batch, time, heads = shape
    inputs = make(1 if full else batch, batch * time if full else time, heads, *sizes, dtype, skip=0)
    cu_seqlens = torch.tensor([0, *range(2, batch + 1), batch * time]) if full else None
    mask = torch.ones(inputs[0].shape[:2], dtype=torch.bool) if full else None
    states = make_states(batch, inputs[0], inputs[2])
    arguments = (*inputs, states if full else [], mask, cu_seqlens, 1e-6)
    h, norms, *last = backend.scan(*arguments, True, reverse)
    backend.scan_backward(*arguments, h, norms, h, last if full else [], reverse)
    token = [x[:, 0] for x in inputs]
    real = torch.ones(len(token[0]), dtype=torch.bool) if full else None
    triton_step.decode(*token, *[s[: len(token[0])] for s in states], real, 1e-6)


def kernels_for(target):
    return {kernel.__name__: list(kernel.device_caches[target][0].values()) for kernel in KERNELS}


def check_compiled(target, spilled):
    for name, kernels in kernels_for(target).items():
        assert kernels, name
        for kernel in kernels:
            assert kernel.metadata.shared <= shared.TARGETS[target][1], name
            found = shared.spills(kernel)
            found.pop("sgpr_spill_count", None)  # scalars spill to lanes of a vector register
            assert found and max(found.values()) <= spilled, (name, found)


def spilled(target, dtype, sizes):
    """Bytes (registers on AMD): next to nothing in bfloat16 with heads of usual sizes; elsewhere a little."""
    usual = dtype == torch.bfloat16 and sizes[0] % 16 == sizes[1] % 16 == 0
    return {"sm_80": 80, "sm_90": 0, "gfx942": 2}[target] if usual else 640


@pytest.mark.parametrize(
    "target, sizes, full, reverse",
    [
        ("sm_90", (128, 256), True, False),
        pytest.param("sm_90", (128, 256), True, True, marks=pytest.mark.slow),
        pytest.param("gfx942", (64, 64), False, False, marks=pytest.mark.slow),
    ],
    indirect=["target"],
)
def test_compiles_without_spills(chip, sizes, full, reverse):
    launch(sizes=sizes, full=full, reverse=reverse)
    check_compiled(chip, spilled(chip, torch.bfloat16, sizes))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sizes", [(32, 64), (64, 64), (128, 256), (256, 512), (20, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
def test_every_combination_compiles_without_spills(chip, reverse, dtype, sizes):
    for full in (False, True):
        launch(dtype, sizes=sizes, full=full, reverse=reverse)
    check_compiled(chip, spilled(chip, dtype, sizes))


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=[pytest.mark.exhaustive])])
@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_other_lengths_batches_and_heads_compile_nothing_new(chip, full):
    for shape in [(2, 64, 2), (2, 1, 2), (16, 16, 1), (3, 20, 16), (1, 17, 3), (33, 300, 1)]:
        launch(shape=shape, sizes=(16, 16), full=full)
        counts = {name: len(kernels) for name, kernels in kernels_for(chip).items()}
        assert counts == dict.fromkeys(counts, 1), (shape, counts)


# On a GPU, through the operator.


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("keys, values", [(20, 37), (64, 64), (100, 300)])
    def test_all_at_once(self, keys, values, reverse):
        inputs = make(3, 337, 2, keys, values, device="cuda")
        states, mask = make_states(3, inputs[0], inputs[2]), shared.padding(3, 337, "cuda")
        check(errors(run_op, inputs, states, mask, None, 0.1, reverse), 1e-5, 1e-4)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_packed(self, reverse):
        cu_seqlens = torch.tensor([0, 9, 9, 10, 137, 437, 437], device="cuda")
        inputs = make(1, 437, 3, 40, 80, device="cuda")
        states = make_states(6, inputs[0], inputs[2])
        check(errors(run_op, inputs, states, None, cu_seqlens, reverse=reverse), 1e-5, 1e-4)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
    @pytest.mark.parametrize("keys, values", [(32, 64), (128, 256), (256, 512)])
    def test_half_precision(self, keys, values, dtype, tolerance):
        inputs = make(2, 300, 2, keys, values, dtype, "cuda")
        check(errors(run_op, inputs, (), shared.padding(2, 300, "cuda")), tolerance, tolerance)

    def test_the_same_every_time(self):
        arguments = (*make(2, 1000, 2, 128, 256, torch.bfloat16, "cuda"), [], None, None, 1e-6)
        results = []
        for _ in range(3):
            h, norms, *last = op.scan(*arguments, True, False)
            results.append([h, norms, *last, *op.scan_backward(*arguments, h, norms, h, last, False)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)

    def test_step(self):
        inputs = make(3, 1, 4, 128, 256, torch.bfloat16, "cuda")
        states = make_states(3, inputs[0], inputs[2])
        exact, _, *last = op.scan(*inputs, states, None, None, 1e-6, False, False)
        h = op.decode(*(x[:, 0] for x in inputs), *states, None, 1e-6)
        for a, b, limit in zip((h, *states), (exact[:, 0], *last), (1e-2, 1e-2, 1e-5, 1e-5), strict=True):
            assert (a.double() - b.double()).norm() <= limit * b.double().norm()
