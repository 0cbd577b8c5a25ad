"""gated_scan's Triton kernels."""

import pytest
import torch
from ops import test_triton
from ops.test_triton import GATES, check, errors, make, padding, run_backend

from hf_rnn_kernels.gated_scan import triton as backend

chunks = test_triton.chunks


@pytest.fixture
def small(monkeypatch):
    """Small tiles for the chain, and several of them."""
    monkeypatch.setattr(backend, "CHAIN_BT", 2)
    monkeypatch.setattr(backend, "CHAIN_BD", 32)


@pytest.mark.usefixtures("chunks", "poison", "small")
class TestValues:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("gates", GATES)
    def test_all_at_once(self, gates, reverse):
        """Strided inputs, initial states, padding."""
        inputs = make(gates, (2, 21, 19), strided=True)
        check(errors(run_backend, gates, inputs, torch.randn(2, 19), padding(2, 21), reverse=reverse))

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("gates, dtype", [("linear", torch.int64), ("min_gru+g", torch.int32)])
    def test_packed(self, gates, dtype, reverse):
        """Sequences of 9, 0, 1, 27 and 0 rows, with padding."""
        cu_seqlens = torch.tensor([0, 9, 9, 10, 37, 37], dtype=dtype)
        inputs = make(gates, (1, 37, 5))
        check(errors(run_backend, gates, inputs, torch.randn(5, 5), padding(2, 37)[:1], cu_seqlens, reverse))

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


@pytest.mark.usefixtures("small")
def test_padding_and_packing_change_no_bit():
    inputs = make("min_lstm+g", (1, 24, 3))
    h, last = backend.scan("min_lstm+g", [x[:, 5:19] for x in inputs])
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[:, 5:19] = True
    padded, padded_last = backend.scan("min_lstm+g", inputs, None, mask)
    packed, packed_last = backend.scan("min_lstm+g", inputs, None, None, torch.tensor([0, 5, 19, 24]))
    assert torch.equal(padded[:, 5:19], h) and torch.equal(packed[:, 5:19], h)
    assert torch.equal(padded_last, last) and torch.equal(packed_last[1:2], last)
