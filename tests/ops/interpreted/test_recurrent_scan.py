"""recurrent_scan's Triton kernels."""

import pytest
import torch
from ops import test_recurrent_triton
from ops.test_recurrent_triton import CELLS, check, errors, make, make_states, run_backend
from ops.test_triton import padding

from hf_rnn_kernels.recurrent_scan import reference
from hf_rnn_kernels.recurrent_scan import triton as backend

path = test_recurrent_triton.path


@pytest.mark.usefixtures("bfloat16_dot", "poison", "small_streams")
class TestValues:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("cell", CELLS)
    def test_all_at_once(self, cell, reverse, path):
        """Two heads of an odd size, initial states, strided x, padding on both sides, inside, and nothing else."""
        arguments = make(cell, 3, 7, 2, 19, strided=True)
        check(errors(run_backend, cell, *arguments, make_states(cell, 3, 38), padding(3, 7), None, reverse))

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("cell, dtype", [("gru", torch.int32), ("lstm", torch.int64)])
    def test_packed(self, cell, dtype, reverse, path):
        """Sequences of 0, 4, 0, 1, 6 and 0 rows, with padding."""
        cu_seqlens = torch.tensor([0, 0, 4, 4, 5, 11, 11], dtype=dtype)
        arguments = make(cell, 1, 11, 2, 3)
        check(errors(run_backend, cell, *arguments, make_states(cell, 6, 6), padding(2, 11)[:1], cu_seqlens, reverse))

    @pytest.mark.parametrize("cell, heads, size", [("lstm", 1, 40), ("gru", 3, 16), ("gru", 1, 1)])
    def test_sizes(self, cell, heads, size, path):
        x, weight, _ = make(cell, 1, 3, heads, size)
        check(errors(run_backend, cell, x, weight, None))

    @pytest.mark.parametrize("cell", CELLS)
    def test_many_sequences(self, cell):
        check(errors(run_backend, cell, *make(cell, 35, 2, 1, 3), make_states(cell, 35, 3)))

    @pytest.mark.parametrize("programs, reverse", [(4, False), (4, True), (1, False)])
    def test_gates_are_computed_again_by_any_number_of_programs(self, programs, reverse, monkeypatch):
        monkeypatch.setattr(backend, "PROGRAMS", programs)
        monkeypatch.setattr(backend, "STEPS", 1)
        check(errors(run_backend, "gru", *make("gru", 2, 6, 1, 3), reverse=reverse))

    @pytest.mark.exhaustive
    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("size", [3, 16, 19, 40])
    @pytest.mark.parametrize("heads", [1, 3])
    @pytest.mark.parametrize("cell", CELLS)
    def test_every_combination(self, cell, heads, size, masked, packed, reverse, path):
        cu_seqlens = torch.tensor([0, 0, 9, 10, 10, 18]) if packed else None
        arguments = make(cell, *((1, 18) if packed else (2, 9)), heads, size)
        states = make_states(cell, 5 if packed else 2, heads * size)
        mask = padding(2, 9) if masked else None
        mask = mask.reshape(1, 18) if masked and packed else mask
        check(errors(run_backend, cell, *arguments, states, mask, cu_seqlens, reverse))

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
        h, _, _ = backend.scan("gru", x, weight, bias, [], None, torch.tensor([-50, 2, 10**9]), reverse=True)
        assert torch.equal(h[:, 2:], backend.scan("gru", x[:, 2:], weight, bias, [], reverse=True)[0])


@pytest.mark.usefixtures("small_streams")
@pytest.mark.parametrize("cell", CELLS)
def test_padding_and_packing_change_no_bit(cell, path):
    x, weight, bias = make(cell, 1, 9, 1, 3)
    h, _, last = backend.scan(cell, x[:, 2:7], weight, bias, [])
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[:, 2:7] = True
    padded, _, padded_last = backend.scan(cell, x, weight, bias, [], mask)
    packed, _, packed_last = backend.scan(cell, x, weight, bias, [], None, torch.tensor([0, 2, 7, 9]))
    assert torch.equal(padded[:, 2:7], h) and torch.equal(packed[:, 2:7], h)
    assert torch.equal(padded_last, last) and torch.equal(packed_last[:, 1:2], last)
