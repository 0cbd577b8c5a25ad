"""The Triton backend of mlstm_scan, tested as that of gated_scan is in `test_triton.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_rnn_kernels.mlstm_scan import op, reference

triton = pytest.importorskip("triton")
from ops import test_recurrent_triton  # noqa: E402
from ops import test_triton as shared  # noqa: E402

from hf_rnn_kernels.mlstm_scan import triton as backend  # noqa: E402
from hf_rnn_kernels.mlstm_scan import triton_backward, triton_chunks, triton_step  # noqa: E402

compiled, gpu, interpreted = shared.compiled, shared.gpu, shared.interpreted
poison, reverse, target = shared.poison, shared.reverse, shared.target
bfloat16_dot = test_recurrent_triton.bfloat16_dot

MODULES = [backend, triton_backward, triton_chunks, triton_step]
FORWARD = [triton_chunks._gates, triton_chunks._states, backend._outputs]
BACKWARD = [getattr(triton_backward, f"_{n}") for n in ("normalizers", "states_back", "grad_q", "grad_k", "grad_v")]
BACKWARD += [triton_backward._grad_gates]
KERNELS = [*FORWARD, *BACKWARD, triton_step._step]
PLAN = triton_chunks._plan
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


def errors(run, inputs, states=(), mask=None, cu_seqlens=None, eps=1e-6):
    """Relative errors of all results, forward and backward, against the reference in float64."""

    def exact(x):
        return None if x is None else x.cpu().double() if x.is_floating_point() else x.cpu()

    arguments = [*map(exact, inputs), [exact(s) for s in states], exact(mask), exact(cu_seqlens), eps]
    h, norms, *last = reference.scan(*arguments, training=True)
    grad, grad_last = torch.randn(h.shape).to(inputs[0].dtype), [torch.randn(s.shape) for s in last if states]
    back = reference.scan_backward(*arguments, h, norms, grad.double(), [g.double() for g in grad_last])
    expected = [h, *norms.unbind(3), *last, *back]
    if mask is not None:  # what padding holds is nothing
        padding = ~mask.bool()
        inputs = [x.masked_fill(padding[(...,) + (None,) * (x.dim() - 2)], torch.nan) for x in inputs]
        grad = grad.to(h.device).masked_fill(padding.cpu()[..., None, None], torch.nan)
    device = inputs[0].device
    actual = run(inputs, list(states), mask, cu_seqlens, eps, grad.to(device), [g.to(device) for g in grad_last])
    dtypes = [inputs[0].dtype, *[torch.float32] * 5, *[x.dtype for x in inputs], *[torch.float32] * 3]
    result = {}
    for name, a, e, dtype in zip(NAMES, actual, expected, dtypes, strict=True):
        if a is not None:  # what the operator does not show
            assert a.shape == e.shape and a.dtype == dtype, name
            result[name] = ((a.cpu().double() - e).norm() / e.norm().clamp_min(1e-30)).item()
    return result


def run_backend(inputs, states, mask, cu_seqlens, eps, grad, grad_last):
    arguments = (*inputs, states, mask, cu_seqlens, eps)
    h, norms, *last = backend.scan(*arguments, True)
    return h, *norms.unbind(3), *last, *backend.scan_backward(*arguments, h, norms, grad, grad_last)


def run_op(inputs, states, mask, cu_seqlens, eps, grad, grad_last):
    leaves = [x.detach().requires_grad_() for x in (*inputs, *states)]
    h, norms, *last = op.scan(*leaves[:5], leaves[5:], mask, cu_seqlens, eps, True)
    grads = torch.autograd.grad([h, *last[: len(grad_last)]], leaves, [grad, *grad_last])
    return h, *norms.unbind(3), *last, *grads, *[None] * (8 - len(grads))


def check(result, forward=2e-6, backward=1e-5):
    for name, error in result.items():
        assert error <= (backward if name.startswith("grad") else forward), result  # NaN fails, too


@pytest.fixture
def small(monkeypatch):
    """Tiles that let a few tokens be several chunks, and a few channels several blocks."""
    walk = {"BK": 16, "BV": 16, "STAGES": 1, "num_warps": 4}
    tiles = {"L": 32, "BT": 16, "BK": 16, "BV": 32, "walk": walk}
    monkeypatch.setattr(triton_chunks, "_plan", lambda *arguments: PLAN(*arguments) | tiles)


@pytest.fixture
def quick(monkeypatch):
    """The interpreter takes half a millisecond to enter a function: enter only kernels."""
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if type(value).__name__ == "InterpretedFunction" and value not in KERNELS:
                value.fn.fn = value.fn  # as tl.associative_scan asks for it
                monkeypatch.setattr(module, name, value.fn)


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
@pytest.mark.usefixtures("bfloat16_dot", "poison", "quick", "reverse", "small")
class TestInterpreted:
    def test_all_at_once(self):
        """Two heads of odd sizes, strided, initial states, NaN as padding on both sides, inside, and nothing else."""
        inputs = make(2, 67, 2, 20, 37)
        check(errors(run_backend, inputs, make_states(2, inputs[0], inputs[2]), shared.padding(2, 67), None, 0.1))

    @pytest.mark.parametrize("time", [1, 5, 31, 32, 33, 65])
    def test_lengths(self, time):
        inputs = make(2, time, 1, 3, 5)
        check(errors(run_backend, inputs, make_states(2, inputs[0], inputs[2]), eps=0.1))

    @pytest.mark.parametrize("keys, values", [(1, 1), (16, 32), (48, 16), (3, 70)])
    def test_sizes(self, keys, values):
        check(errors(run_backend, make(1, 19, 1, keys, values)))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_packed(self, dtype):
        """Sequences of 4, 0, 1, 64, 33 and 0 rows, with padding."""
        cu_seqlens = torch.tensor([0, 4, 4, 5, 69, 102, 102], dtype=dtype)
        inputs = make(1, 102, 2, 3, 5)
        states, mask = make_states(6, inputs[0], inputs[2]), shared.padding(2, 102)[:1]
        check(errors(run_backend, inputs, states, mask, cu_seqlens, 0.1))

    @pytest.mark.parametrize("keys, values, dtype", [(100, 70, torch.float32), (33, 129, torch.bfloat16)])
    def test_tiles_of_the_gpu(self, keys, values, dtype, monkeypatch):
        monkeypatch.setattr(triton_chunks, "_plan", PLAN)
        inputs = make(1, 131, 1, keys, values, dtype)
        limits = (2e-6, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
        check(errors(run_backend, inputs, make_states(1, inputs[0], inputs[2]), eps=0.1), *limits)

    @pytest.mark.parametrize("eps", [1e-6, pytest.param(0.1, marks=[pytest.mark.exhaustive])])
    @pytest.mark.parametrize("low, high", [(-15.0, 15.0), (-15.0, -14.0), (30.0, 30.0), (10.0, 12.0)])
    def test_extreme_gates(self, low, high, eps):
        """Input gates from e^-15 to e^15, forget gates that keep nothing, everything, and all between."""
        q, k, v, i, f = make(1, 67, 1, 5, 3)
        inputs = [q, k, v, torch.empty_like(i).uniform_(-15, 15), torch.empty_like(f).uniform_(low, high)]
        result = errors(run_backend, inputs, make_states(1, q, v), eps=eps)
        check(result, 1e-5, 1e-4)

    def test_a_very_closed_gate(self):
        """What follows a reset of e^-1e6 is as exact as without: the sum of log gates in a chunk is no small number."""
        q, k, v, i, f = make(1, 40, 1, 5, 3)
        f[:, 10] = -1e6
        h = backend.scan(q, k, v, i, f, [], None, None, 1e-6, False)[0]
        later = backend.scan(*(x[:, 10:] for x in (q, k, v, i, f)), [], None, None, 1e-6, False)[0]
        torch.testing.assert_close(h[:, 10:], later, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
    def test_half_precision(self, dtype, tolerance):
        inputs = make(1, 67, 1, 19, 40, dtype)
        states, mask = make_states(1, inputs[0], inputs[2]), torch.rand(1, 67) < 0.9
        check(errors(run_backend, inputs, states, mask), tolerance, tolerance)

    def test_half_precision_keeps_large_states(self):
        """States and gradients over e^-m beyond 65504, the largest float16."""
        inputs = make(1, 40, 1, 3, 3, torch.float16)
        inputs[1], inputs[2] = inputs[1] * 300, inputs[2] * 300
        inputs[3], inputs[4] = inputs[3] + 15, inputs[4] + 15
        check(errors(run_backend, inputs), 2e-3, 2e-3)

    def test_rounding_states_between_chunks_loses_nothing(self, monkeypatch):
        """In bfloat16 the products would round them; only the gradient of f reads C and dC as they are stored."""
        inputs = make(1, 150, 1, 20, 24, torch.bfloat16)
        arguments = (inputs, make_states(1, inputs[0], inputs[2]), None, None, 1e-6, torch.randn(1, 150, 1, 24), [])
        rounded = run_backend(*arguments)
        shapes = triton_chunks._Launch.state_shapes
        monkeypatch.setattr(
            triton_chunks._Launch, "between", lambda self: [self.empty(*s) for s in shapes(self, self.chunks)[:2]]
        )
        for name, a, b in zip(NAMES, rounded, run_backend(*arguments), strict=True):
            assert (a - b).norm() <= (5e-4 if name == "grad f" else 1e-4) * b.norm(), name

    def test_inference_keeps_nothing_and_changes_no_bit(self):
        arguments = (*make(2, 40, 1, 3, 5), [], None, None, 1e-6)
        h, norms, *last = backend.scan(*arguments, True)
        plain, no_norms, *plain_last = backend.scan(*arguments, False)
        assert no_norms.shape == (2, 40, 1, 0) and norms.shape == (2, 40, 1, 2)
        for a, b in zip((h, *last), (plain, *plain_last), strict=True):
            assert torch.equal(a, b)

    def test_layouts(self):
        """Transposed, expanded and sliced inputs, states and gradients are read as what they are."""
        inputs = make(2, 35, 1, 3, 5)
        skewed = [x.mT.contiguous().mT for x in inputs]
        skewed[1], skewed[3] = skewed[1][:1].expand(2, -1, -1, -1), skewed[3][:1].expand(2, -1, -1)
        states = [s.transpose(0, 1).contiguous().transpose(0, 1) for s in make_states(2, inputs[0], inputs[2])]
        grads = torch.randn(2, 70, 1, 5)[:, ::2], torch.ones(1, 1, 1, 1).expand(2, 35, 1, 5)
        for grad in grads:
            one = run_backend(skewed, states, None, None, 1e-6, grad, states)
            whole = [s.contiguous() for s in states]
            other = run_backend([x.contiguous() for x in skewed], whole, None, None, 1e-6, grad.contiguous(), whole)
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b)

    def test_packing_changes_no_bit(self):
        inputs, grad = make(1, 75, 1, 3, 5), torch.randn(1, 75, 1, 5)
        states = make_states(2, inputs[0], inputs[2])
        cu_seqlens = torch.tensor([0, 36, 75])
        packed = run_backend(inputs, states, None, cu_seqlens, 1e-6, grad, states)
        for n, at in enumerate((slice(0, 36), slice(36, 75))):
            own = [s[n : n + 1] for s in states]
            alone = run_backend([x[:, at] for x in inputs], own, None, None, 1e-6, grad[:, at], own)
            for name, a, b in zip(NAMES, packed, alone, strict=True):
                of_states = name.startswith("last") or name in ("grad C", "grad n", "grad m")
                assert torch.equal(a[n : n + 1] if of_states else a[:, at], b), name

    def test_nan_is_not_hidden(self):
        for which in range(5):  # within a tile it may go back in time, as in any attention
            inputs = [x.clone() for x in make(2, 40, 1, 3, 5)]
            inputs[which][0, 35] = torch.nan
            h, _, *last = backend.scan(*inputs, [], None, None, 1e-6, False)
            assert h[0, 35].isnan().all() and h[0, :32].isfinite().all() and h[1].isfinite().all()
            assert which == 0 or last[0][0].isnan().all()

    def test_wrong_offsets_read_and_write_inside(self):
        """Under torch.compile offsets are not checked; those beyond the rows are cut off, and none goes back."""
        inputs = make(1, 70, 1, 3, 5)
        h = backend.scan(*inputs, [], None, torch.tensor([-50, 2, 10**9]), 1e-6, False)[0]
        assert torch.equal(h[:, 2:], backend.scan(*(x[:, 2:] for x in inputs), [], None, None, 1e-6, False)[0])
        table, offsets, firsts = triton_chunks._cut(torch.tensor([0, 70, 0, 70, 5, 70]), 70, 32)
        assert table.shape[0] == 70 // 32 + 5 and firsts.max() + 3 <= table.shape[0]
        assert (table.sum(1) <= 70).all() and (offsets[1:] >= offsets[:-1]).all()

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
    @pytest.mark.parametrize("heads, keys, values", [(2, 40, 70), (1, 1, 1)])
    def test_step(self, heads, keys, values, dtype, tolerance):
        """One token as the reference takes it; at m = 100 the normaliser alone counts, at -100 e^-m."""
        inputs = [x[:, 0] for x in make(3, 2, heads, keys, values, dtype)]
        states = make_states(3, inputs[0][:, None], inputs[2][:, None])
        states[2][1], states[2][2] = 50.0, -50.0
        h, *new = triton_step.step(*inputs, *states, 1e-6)
        q, k, v, i, f = (x.double() for x in inputs)
        exact, _, of_states = reference.step(
            (q, k, v, i, torch.nn.functional.logsigmoid(f)), tuple(s.double() for s in states), 1e-6
        )
        assert h.dtype == dtype and all(s.dtype == torch.float32 for s in new)
        for a, b, limit in zip((h, *new), (exact, *of_states), (tolerance, 1e-6, 1e-6, 1e-6), strict=True):
            for n in range(3):
                assert a.shape == b.shape and (a[n] - b[n]).norm() <= limit * b[n].norm()

    @pytest.mark.exhaustive
    @pytest.mark.timeout(1200)
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("given", [False, True])
    @pytest.mark.parametrize("keys, values", [(3, 16), (20, 48), (64, 33)])
    @pytest.mark.parametrize("heads", [1, 3])
    def test_every_combination(self, heads, keys, values, given, masked, packed):
        cu_seqlens = torch.tensor([0, 0, 9, 10, 45, 138]) if packed else None
        inputs = make(*((1, 138) if packed else (2, 69)), heads, keys, values)
        states = make_states(5 if packed else 2, inputs[0], inputs[2]) if given else ()
        mask = shared.padding(2, 69) if masked else None
        mask = mask.reshape(1, 138) if masked and packed else mask
        check(errors(run_backend, inputs, states, mask, cu_seqlens, 0.1 if given else 1e-6))


# Compilation, by the driver of `test_triton.py`, which launches nothing.


@pytest.fixture
def chip(target, monkeypatch):
    """The GPU that is not there, also for the choice of tiles."""
    monkeypatch.setattr(triton_chunks, "_is_amd", lambda device: target.startswith("gfx"))
    yield target
    for kernel in KERNELS:
        kernel.device_caches.pop(target, None)


def launch(dtype=torch.bfloat16, shape=(2, 4, 2), sizes=(64, 64), full=False):
    """Both directions, padded, packed and with initial states if `full`."""
    batch, time, heads = shape
    inputs = make(1 if full else batch, batch * time if full else time, heads, *sizes, dtype, skip=0)
    cu_seqlens = torch.tensor([0, *range(2, batch + 1), batch * time]) if full else None
    mask = torch.ones(inputs[0].shape[:2], dtype=torch.bool) if full else None
    states = make_states(batch, inputs[0], inputs[2])
    arguments = (*inputs, states if full else [], mask, cu_seqlens, 1e-6)
    h, norms, *last = backend.scan(*arguments, True)
    backend.scan_backward(*arguments, h, norms, h, last if full else [])
    token = [x[:, 0] for x in inputs]
    triton_step.step(*token, *[s[: len(token[0])] for s in states], 1e-6)


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


@compiled
@pytest.mark.parametrize(
    "target, sizes, full",
    [("sm_90", (128, 256), True), pytest.param("gfx942", (64, 64), False, marks=pytest.mark.slow)],
    indirect=["target"],
)
def test_compiles_without_spills(chip, sizes, full):
    launch(sizes=sizes, full=full)
    check_compiled(chip, spilled(chip, torch.bfloat16, sizes))


@compiled
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sizes", [(32, 64), (64, 64), (128, 256), (256, 512), (20, 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
def test_every_combination_compiles_without_spills(chip, dtype, sizes):
    for full in (False, True):
        launch(dtype, sizes=sizes, full=full)
    check_compiled(chip, spilled(chip, dtype, sizes))


@compiled
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

    @pytest.mark.parametrize("keys, values", [(20, 37), (64, 64), (100, 300)])
    def test_all_at_once(self, keys, values):
        inputs = make(3, 337, 2, keys, values, device="cuda")
        states, mask = make_states(3, inputs[0], inputs[2]), shared.padding(3, 337, "cuda")
        check(errors(run_op, inputs, states, mask, None, 0.1), 1e-5, 1e-4)

    def test_packed(self):
        cu_seqlens = torch.tensor([0, 9, 9, 10, 137, 437, 437], device="cuda")
        inputs = make(1, 437, 3, 40, 80, device="cuda")
        check(errors(run_op, inputs, make_states(6, inputs[0], inputs[2]), None, cu_seqlens), 1e-5, 1e-4)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
    @pytest.mark.parametrize("keys, values", [(32, 64), (128, 256), (256, 512)])
    def test_half_precision(self, keys, values, dtype, tolerance):
        inputs = make(2, 300, 2, keys, values, dtype, "cuda")
        check(errors(run_op, inputs, (), shared.padding(2, 300, "cuda")), tolerance, tolerance)

    def test_the_same_every_time(self):
        arguments = (*make(2, 1000, 2, 128, 256, torch.bfloat16, "cuda"), [], None, None, 1e-6)
        results = []
        for _ in range(3):
            h, norms, *last = op.scan(*arguments, True)
            results.append([h, norms, *last, *op.scan_backward(*arguments, h, norms, h, last)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)

    def test_step(self):
        inputs = make(3, 1, 4, 128, 256, torch.bfloat16, "cuda")
        states = make_states(3, inputs[0], inputs[2])
        h, *new = triton_step.step(*(x[:, 0] for x in inputs), *states, 1e-6)
        exact, _, *last = op.scan(*inputs, states, None, None, 1e-6, False)
        for a, b, limit in zip((h, *new), (exact[:, 0], *last), (1e-2, 1e-2, 1e-5, 1e-5), strict=True):
            assert (a.double() - b.double()).norm() <= limit * b.double().norm()
