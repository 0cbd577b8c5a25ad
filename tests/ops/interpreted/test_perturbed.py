"""The Triton kernels of perturbed weights."""

import pytest
import torch
from ops import test_recurrent_triton as recurrent
from ops.test_perturbed_triton import CELLS, HALF, check, check_scan, make, make_perturbation
from ops.test_triton import padding

from hf_rnn_kernels.perturbed import triton as backend
from hf_rnn_kernels.recurrent_scan import triton as scan_backend

path = recurrent.path


@pytest.mark.usefixtures("bfloat16_dot", "poison")
class TestLinear:
    @pytest.mark.parametrize(
        "shape", [(5, 3, 19, 7), (3, 1, 33, 130), (1, 1, 1, 1), (70, 1, 16, 64), (2, 65, 40, 65)], ids=str
    )
    @pytest.mark.parametrize("rank", [1, 2])
    def test_sizes(self, shape, rank):
        """A tile of rows spans several members, and a member several tiles."""
        check(backend.linear, make(*shape, rank))

    @pytest.mark.parametrize("dtype, tolerance", HALF)
    def test_half_precision(self, dtype, tolerance):
        check(backend.linear, make(5, 3, 70, 19, 2, dtype), tolerance)

    def test_more_tiles_than_a_group(self, monkeypatch):
        monkeypatch.setattr(backend, "_plan", lambda *_: {"BM": 16, "BO": 16, "BI": 16, "STAGES": 1})
        check(backend.linear, make(54, 3, 9, 50))

    def test_layouts(self):
        """Factors in float32 beside x in 16 bits, transposed, and x that no distance of rows describes."""
        x, weight, left, right = make(3, 2, 19, 7, 2)
        x, left, right = x.mT.contiguous().mT, left.mT.contiguous().mT, right.mT.contiguous().mT
        check(backend.linear, (x, weight.mT.contiguous().mT, left, right))
        check(backend.linear, (x.bfloat16(), weight.bfloat16(), left, right), 1e-2)

    def test_nothing(self):
        assert backend.linear(*make(3, 0, 5, 7)).shape == (3, 0, 7)

    def test_nan_stays_in_its_member(self):
        x, weight, left, right = make(3, 2, 5, 7)
        right[1] = float("nan")
        wrong = backend.linear(x, weight, left, right).isnan()
        assert wrong[1].all() and not wrong[::2].any()


@pytest.mark.usefixtures("bfloat16_dot", "poison", "small_streams")
class TestScan:
    @pytest.mark.parametrize("cell, members, rows, rank", [("lstm", 2, 3, 1), ("gru", 3, 1, 2), ("slstm", 1, 3, 2)])
    def test_all_at_once(self, cell, members, rows, rank, path):
        """Two heads of an odd size, initial states, strided x, padding on both sides and inside."""
        sequences = members * rows
        arguments = recurrent.make(cell, sequences, 6, 2, 19, strided=True)
        states, mask = recurrent.make_states(cell, sequences, 38), padding(sequences, 6)
        perturbation = make_perturbation(cell, members, 2, 19, rank)
        check_scan(scan_backend.scan, cell, *arguments, states, mask, None, perturbation)

    @pytest.mark.parametrize("cell, members, reverse", [("gru", 2, True), ("lstm", 4, False)])
    def test_packed(self, cell, members, reverse, path):
        cu_seqlens = torch.tensor([0, 4, 4, 5, 11])
        x, weight, _ = recurrent.make(cell, 1, 11, 2, 3)
        perturbation = make_perturbation(cell, members, 2, 3)
        check_scan(scan_backend.scan, cell, x, weight, None, [], None, cu_seqlens, perturbation, reverse=reverse)

    def test_many_members(self, path):
        """More sequences than a program has, so that the last one has some that are not there."""
        x, weight, _ = recurrent.make("gru", 35, 2, 1, 3)
        check_scan(scan_backend.scan, "gru", x, weight, None, [], None, None, make_perturbation("gru", 7, 1, 3))

    @pytest.mark.parametrize("dtype, tolerance", HALF)
    def test_half_precision(self, dtype, tolerance, path):
        """Factors in float32, as the weights of autocast are."""
        x, weight, bias = recurrent.make("lstm", 6, 5, 1, 19)
        perturbation = make_perturbation("lstm", 2, 1, 19)
        check_scan(
            scan_backend.scan, "lstm", x.to(dtype), weight, bias, [], None, None, perturbation, tolerance
        )  # fmt: skip

    @pytest.mark.exhaustive
    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("size", [3, 16, 40])
    @pytest.mark.parametrize("members, rows, rank", [(1, 1, 1), (3, 1, 2), (2, 3, 1), (6, 3, 2)])
    @pytest.mark.parametrize("cell", CELLS)
    def test_every_combination(self, cell, members, rows, rank, size, masked, path):
        sequences = members * rows
        states = recurrent.make_states(cell, sequences, 2 * size)
        mask = padding(sequences, 4) if masked else None
        perturbation = make_perturbation(cell, members, 2, size, rank)
        arguments = recurrent.make(cell, sequences, 4, 2, size)
        check_scan(scan_backend.scan, cell, *arguments, states, mask, None, perturbation)
