"""swiglu, silu_gate and gated_norm, fused on a CPU, against torch in float64."""

import pytest
import torch
from conftest import relative_error

from hf_rnn_kernels import gated_norm, rms_norm, silu_gate, swiglu


def gradients(function, leaves, grad, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


def check(function, expected, leaves, shape):
    grad = torch.randn(shape)
    for a, b in zip(
        gradients(function, leaves, grad, torch.float32), gradients(expected, leaves, grad, torch.float64), strict=True
    ):
        assert a.shape == b.shape and relative_error(a, b) <= 5e-6


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 300, 2 * 352), (70001, 2), (11, 7001 * 2)])
def test_swiglu(shape):
    def expected(x):
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    check(swiglu, expected, [3 * torch.randn(shape)], (*shape[:-1], shape[-1] // 2))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 300, 352), (70001,), (11, 7001)])
def test_silu_gate(shape):
    leaves = [torch.randn(shape), 3 * torch.randn(shape)]
    check(silu_gate, lambda h, gate: h * gate * torch.sigmoid(gate), leaves, shape)
    halves = torch.randn(*shape[:-1], 2 * shape[-1]).chunk(2, -1)  # which lie in rows of both
    torch.testing.assert_close(silu_gate(*halves), silu_gate(*(x.contiguous() for x in halves)))


@pytest.mark.parametrize("rows, heads, size", [((3, 5), 2, 4), ((2, 300), 4, 64), ((4001,), 3, 7), ((12000,), 1, 6)])
def test_gated_norm(rows, heads, size):
    def expected(h, gate, weight):
        n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return torch.sigmoid(gate) * weight * n.flatten(-2)

    leaves = [2 * torch.randn(*rows, heads, size) + 1, torch.randn(*rows, heads * size), torch.randn(heads * size)]
    check(lambda *x: gated_norm(*x, 1e-5), expected, leaves, (*rows, heads * size))


def test_gates_that_are_slices_of_a_projection():
    projection, weight = torch.randn(2, 500, 3 * 96), torch.randn(96)
    h = torch.randn(2, 500, 4, 24)
    gate = projection[..., 96:192]
    assert torch.equal(gated_norm(h, gate, weight, 1e-6), gated_norm(h, gate.contiguous(), weight, 1e-6))


def test_registration():
    x = torch.randn(64, 2048, requires_grad=True)
    torch.library.opcheck(torch.ops.hf_rnn.swiglu.default, (x,))
    torch.library.opcheck(torch.ops.hf_rnn.silu_gate.default, (x, torch.randn(64, 2048, requires_grad=True)))
    leaves = [torch.randn(900, 4, 24), torch.randn(900, 96), torch.randn(96)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    torch.library.opcheck(torch.ops.hf_rnn.gated_norm.default, (*leaves, 1e-6))


@pytest.mark.parametrize("op", [swiglu, lambda x: rms_norm(x, torch.ones(64, dtype=x.dtype), 1e-6)])
def test_sizes_do_not_matter_where_torch_does_it(op):
    """Exported with a dynamic length that may or may not be large."""

    class Module(torch.nn.Module):
        def forward(self, x):
            return op(x)

    length = torch.export.Dim("length", min=2, max=2**16)
    x = torch.randn(2, 30, 64, dtype=torch.bfloat16)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({1: length},))
    long = torch.randn(2, 1024, 64, dtype=torch.bfloat16)
    assert torch.equal(program.module()(long), op(long))


def test_bad_input():
    with pytest.raises(ValueError, match="x: expected an even"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="gate: expected the shape of h"):
        silu_gate(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="gate: expected h"):
        gated_norm(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(12), 1e-6)
    with pytest.raises(ValueError, match="weight: expected shape"):
        gated_norm(torch.zeros(2, 3, 4), torch.zeros(2, 12), torch.zeros(3), 1e-6)
