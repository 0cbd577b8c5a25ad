"""The Triton backends of perturbed weights, tested as that of gated_scan is in `test_triton.py`."""

import pytest
import torch

from hf_rnn_kernels.perturbed import op, reference
from hf_rnn_kernels.recurrent_scan import op as scan_op
from hf_rnn_kernels.recurrent_scan import reference as scan_reference

triton = pytest.importorskip("triton")
from ops import test_recurrent_triton as recurrent  # noqa: E402
from ops import test_triton as shared  # noqa: E402

from hf_rnn_kernels.perturbed import triton as backend  # noqa: E402
from hf_rnn_kernels.recurrent_scan import triton as scan_backend  # noqa: E402

gpu, target = shared.gpu, shared.target
chip, path = recurrent.chip, recurrent.path

CELLS = recurrent.CELLS
HALF = [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
KERNELS = [backend._linear, scan_backend._forward, scan_backend._forward_streamed]


def make(members, rows, inner, outer, rank=1, dtype=torch.float32, device="cpu"):
    """x, a slice of something larger, weight, left, right: both parts of y of size one."""
    torch.manual_seed(0)
    whole = torch.randn(members, rows, inner + 16).to(device, dtype)
    weight, left = torch.randn(outer, inner) / inner**0.5, torch.randn(members, outer, rank)
    right = torch.randn(members, inner, rank) / inner**0.5
    return whole[..., :inner], *[t.to(device, dtype) for t in (weight, left, right)]


def error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.cpu().double() - expected).norm() / expected.norm()).item()


def check(run, arguments, tolerance=1e-6):
    y = run(*arguments)
    assert y.dtype == arguments[0].dtype
    assert error(y, reference.linear(*[t.cpu().double() for t in arguments])) <= tolerance


def make_perturbation(cell, members, heads, size, rank=1, device="cpu"):
    torch.manual_seed(1)
    rows = scan_reference.CELLS[cell].gates * size
    left, right = torch.randn(members, heads, rows, rank), torch.randn(members, heads, size, rank) / size**0.5
    return [t.to(device) for t in (left, right, torch.randn(members, heads * rows))]


def check_scan(run, cell, x, weight, bias, states, mask, cu_seqlens, perturbation, tolerance=1e-6, reverse=False):
    def exact(t):
        return None if t is None else t.cpu().double() if t.is_floating_point() else t.cpu()

    lists = [[exact(t) for t in tensors] for tensors in (states, perturbation)]
    fixed = [exact(t) for t in (x, weight, bias, mask, cu_seqlens)]
    expected = scan_reference.scan(cell, *fixed[:3], lists[0], *fixed[3:], True, lists[1], reverse)
    actual = run(cell, x, weight, bias, states, mask, cu_seqlens, True, perturbation, reverse)
    for a, e in zip(actual, expected, strict=True):
        assert e.numel() == 0 or error(a, e) <= tolerance


# Compilation, by the driver of `test_triton.py`, which launches nothing.


@pytest.fixture
def gone(chip):
    """The GPU that is not there, for the matrix product, too."""
    yield chip
    backend._linear.device_caches.pop(chip, None)


def launch_scan(cell, members, rows, heads, size, rank, dtype, mask=False):
    x, weight, bias = recurrent.make(cell, members * rows, 4, heads, size, dtype)
    mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask else None
    scan_backend.scan(cell, x, weight, bias, [], mask, perturbation=make_perturbation(cell, members, heads, size, rank))


def kernels_for(target):
    return {kernel.__name__: list(kernel.device_caches[target][0].values()) for kernel in KERNELS}


def check_compiled(target, expected, spilled=0):
    found = kernels_for(target)
    assert {name for name, kernels in found.items() if kernels} == {expected.__name__}
    for kernel in found[expected.__name__]:
        assert kernel.metadata.shared <= shared.TARGETS[target][1]
        spills = shared.spills(kernel)
        spills.pop("sgpr_spill_count", None)  # scalars spill to lanes of a vector register
        assert spills and max(spills.values()) <= spilled, spills


@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
@pytest.mark.parametrize("dtype, sizes", [(torch.bfloat16, (256, 256)), (torch.float32, (51, 19))])
def test_linear_compiles_without_spills(gone, dtype, sizes):
    backend.linear(*make(3, 2, *sizes, 1, dtype))
    check_compiled(gone, backend._linear)


@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
@pytest.mark.parametrize("cell, size, kernel", [("lstm", 64, "_forward"), ("gru", 768, "_forward_streamed")])
def test_scan_compiles_without_spills(gone, cell, size, kernel):
    launch_scan(cell, 3, 2, 1, size, 1, torch.bfloat16, mask=True)
    check_compiled(gone, getattr(scan_backend, kernel))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("sizes", [(16, 16), (512, 50257), (51, 19), (1, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
def test_every_linear_compiles_without_spills(gone, dtype, sizes, rank):
    backend.linear(*make(3, 2, *sizes, rank, dtype))
    check_compiled(gone, backend._linear)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [16, 19, 64, 128, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("target", shared.TARGETS, indirect=True)
def test_every_scan_compiles_without_spills(gone, cell, dtype, size):
    """In 16 bits three registers, where R takes the most; in float32 a GRU of 128 units, which just fits, takes most
    of its factors from memory."""
    launch_scan(cell, 3, 2, 2, size, 1, dtype, mask=True)
    held = bool(scan_backend._forward.device_caches[gone][0])
    spilled = 12 if dtype != torch.float32 and size % 2 == 0 else 360 if size == 128 else 96
    check_compiled(gone, scan_backend._forward if held else scan_backend._forward_streamed, spilled)


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_other_members_rows_and_lengths_compile_nothing_new(gone, monkeypatch):
    for members, rows in [(2, 3), (1, 1), (16, 1), (1, 16), (5, 7)]:
        backend.linear(*make(members, rows, 32, 48, 1, torch.bfloat16))
        for room in (10**6, 0):
            monkeypatch.setattr(scan_backend, "_chip", lambda device, room=room: (room, False))
            launch_scan("gru", members, rows, 2, 16, 1, torch.bfloat16)
        assert [len(kernels) for kernels in kernels_for(gone).values()] == [1, 1, 1], (members, rows)


# On a GPU, through the operators.


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), *HALF])
    @pytest.mark.parametrize("shape", [(5, 3, 19, 7), (300, 1, 256, 513), (2, 700, 520, 256), (1, 1, 1, 1)], ids=str)
    @pytest.mark.parametrize("rank", [1, 2, 5])
    def test_linear(self, shape, rank, dtype, tolerance):
        check(op._linear, make(*shape, rank, dtype, "cuda"), tolerance)

    @pytest.mark.parametrize("members, rows, rank", [(6, 3, 1), (19, 1, 2)])
    @pytest.mark.parametrize("heads, size", [(3, 19), (2, 64)])
    @pytest.mark.parametrize("cell", CELLS)
    def test_scan(self, cell, heads, size, members, rows, rank, path):
        sequences = members * rows
        arguments = recurrent.make(cell, sequences, 57, heads, size, device="cuda", strided=True)
        states = recurrent.make_states(cell, sequences, heads * size, "cuda")
        perturbation = make_perturbation(cell, members, heads, size, rank, "cuda")
        mask = shared.padding(sequences, 57, "cuda")
        check_scan(scan_op.scan, cell, *arguments, states, mask, None, perturbation)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)])
    @pytest.mark.parametrize("heads, size", [(3, 64), (2, 128), (1, 300)])
    @pytest.mark.parametrize("cell", CELLS)
    def test_half_precision_scan(self, cell, heads, size, dtype, tolerance):
        arguments = recurrent.make(cell, 20, 50, heads, size, dtype, "cuda")
        perturbation = make_perturbation(cell, 5, heads, size, 1, "cuda")
        check_scan(scan_op.scan, cell, *arguments, [], None, None, perturbation, tolerance)
