"""mlstm_scan's Triton kernels."""

import pytest
import torch
from ops.test_mlstm_triton import NAMES, check, errors, make, make_states, run_backend
from ops.test_triton import padding

from hf_rnn_kernels.mlstm_scan import reference, triton_chunks, triton_step
from hf_rnn_kernels.mlstm_scan import triton as backend

PLAN = triton_chunks._plan


@pytest.fixture
def small(monkeypatch):
    """Tiles that let a few tokens be several chunks, and a few channels several blocks."""
    walk = {"BK": 16, "BV": 16, "STAGES": 1, "num_warps": 4}
    tiles = {"L": 32, "BT": 16, "BK": 16, "BV": 32, "walk": walk}
    monkeypatch.setattr(triton_chunks, "_plan", lambda *arguments: PLAN(*arguments) | tiles)


@pytest.mark.usefixtures("bfloat16_dot", "poison", "small")
class TestValues:
    @pytest.mark.parametrize("reverse", [False, True])
    def test_all_at_once(self, reverse):
        """Two heads of odd sizes, strided, initial states, NaN as padding on both sides, inside, and nothing else."""
        inputs = make(2, 67, 2, 20, 37)
        check(errors(run_backend, inputs, make_states(2, inputs[0], inputs[2]), padding(2, 67), None, 0.1, reverse))

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("time", [1, 5, 31, 32, 33, 65])
    def test_lengths(self, time, reverse):
        inputs = make(2, time, 1, 3, 5)
        check(errors(run_backend, inputs, make_states(2, inputs[0], inputs[2]), eps=0.1, reverse=reverse))

    @pytest.mark.parametrize("keys, values", [(1, 1), (16, 32), (48, 16), (3, 70)])
    def test_sizes(self, keys, values):
        check(errors(run_backend, make(1, 19, 1, keys, values)))

    @pytest.mark.parametrize("dtype, reverse", [(torch.int32, False), (torch.int64, False), (torch.int64, True)])
    def test_packed(self, dtype, reverse):
        """Sequences of 4, 0, 1, 64, 33 and 0 rows, with padding."""
        cu_seqlens = torch.tensor([0, 4, 4, 5, 69, 102, 102], dtype=dtype)
        inputs = make(1, 102, 2, 3, 5)
        states, mask = make_states(6, inputs[0], inputs[2]), padding(2, 102)[:1]
        check(errors(run_backend, inputs, states, mask, cu_seqlens, 0.1, reverse))

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

    @pytest.mark.parametrize("reverse", [False, True])
    def test_wrong_offsets_read_and_write_inside(self, reverse):
        """Under torch.compile offsets are not checked; those beyond the rows are cut off, and none goes back."""
        inputs = make(1, 70, 1, 3, 5)
        h = backend.scan(*inputs, [], None, torch.tensor([-50, 2, 10**9]), 1e-6, False, reverse)[0]
        alone = backend.scan(*(x[:, 2:] for x in inputs), [], None, None, 1e-6, False, reverse)[0]
        assert torch.equal(h[:, 2:], alone)
        table, offsets, firsts = triton_chunks._cut(torch.tensor([0, 70, 0, 70, 5, 70]), 70, 32, reverse)
        assert table.shape[0] == 70 // 32 + 5 and firsts.max() + 3 <= table.shape[0]
        first, length = table.unbind(1)
        assert ((first - length + 1 >= 0) & (first < 70) if reverse else first + length <= 70)[length > 0].all()
        assert (offsets[1:] >= offsets[:-1]).all()

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
    @pytest.mark.parametrize("heads, keys, values", [(2, 40, 70), (1, 1, 1)])
    def test_step(self, heads, keys, values, dtype, tolerance):
        """One token as the reference takes it, over the states; at m = 50 the normaliser alone counts, at -50 e^-m. A
        row of padding keeps its states."""
        inputs = [x[:, 0] for x in make(3, 2, heads, keys, values, dtype)]
        states = make_states(3, inputs[0][:, None], inputs[2][:, None])
        states[2][1], states[2][2] = 50.0, -50.0
        q, k, v, i, f = (x.double() for x in inputs)
        exact, _, of_states = reference.step(
            (q, k, v, i, torch.nn.functional.logsigmoid(f)), tuple(s.double() for s in states), 1e-6
        )
        padded = [s.clone() for s in states]
        new = [s.clone() for s in states]
        h = triton_step.decode(*inputs, *new, None, 1e-6)
        some = triton_step.decode(*inputs, *padded, torch.tensor([True, False, True]), 1e-6)
        assert torch.equal(some[::2], h[::2]) and not some[1].any()
        for before, given, after in zip(states, padded, new, strict=True):
            assert torch.equal(given[1], before[1]) and torch.equal(given[::2], after[::2])
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
    @pytest.mark.parametrize("reverse", [False, True])
    def test_every_combination(self, reverse, heads, keys, values, given, masked, packed):
        cu_seqlens = torch.tensor([0, 0, 9, 10, 45, 138]) if packed else None
        inputs = make(*((1, 138) if packed else (2, 69)), heads, keys, values)
        states = make_states(5 if packed else 2, inputs[0], inputs[2]) if given else ()
        mask = padding(2, 69) if masked else None
        mask = mask.reshape(1, 138) if masked and packed else mask
        check(errors(run_backend, inputs, states, mask, cu_seqlens, 0.1 if given else 1e-6, reverse))
