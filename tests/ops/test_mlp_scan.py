"""mlp_scan against its equation, in float64."""

import pytest
import torch

from hf_rnn_kernels import mlp_scan
from hf_rnn_kernels.mlp_scan import reference


def operands(layers: int, biases: bool, masked: bool, rows=3, time=5, size=7, tokens=2, channels=3):
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    width = tokens * channels
    x, memory, in_weight, out_weight = (
        leaf(*shape) for shape in ((rows, time, size), (rows, tokens, channels), (size, width), (width, size))
    )
    weights = [leaf(size, size) for _ in range(layers)]
    inner = [leaf(size) for _ in range(layers)] if biases else []
    mask = torch.rand(rows, time) > 0.4 if masked else None
    return x, memory, in_weight, weights, inner, out_weight, leaf(width) if biases else None, mask


@pytest.mark.parametrize("layers, biases, masked", [(0, True, False), (1, False, True), (2, True, True)])
def test_against_the_equation(layers, biases, masked):
    arguments = operands(layers, biases, masked)
    x, memory, in_weight, weights, inner, out_weight, out_bias, _ = arguments
    expected, found = reference.scan(*arguments, 1e-3), mlp_scan(*arguments, eps=1e-3)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(mlp_scan(*arguments, eps=1e-3), expected)
    leaves = [p for p in (x, memory, in_weight, *weights, *inner, out_weight, out_bias) if p is not None]
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_registration():
    *arguments, mask = operands(1, True, True)
    torch.library.opcheck(torch.ops.hf_rnn.mlp_scan.default, (*arguments, mask, 1e-6, True))


def test_what_is_refused():
    x, memory, in_weight, weights, inner, out_weight, out_bias, _ = operands(1, True, False)
    with pytest.raises(ValueError, match=r"weights\[0\]: expected shape \(7, 7\)"):
        mlp_scan(x, memory, in_weight, [out_weight], inner, out_weight, out_bias)
    with pytest.raises(ValueError, match="biases: expected one for each of 1 weights"):
        mlp_scan(x, memory, in_weight, weights, 2 * inner, out_weight, out_bias)
    with pytest.raises(TypeError, match="memory: expected the dtype of x"):
        mlp_scan(x, memory.float(), in_weight, weights, inner, out_weight, out_bias)
    with pytest.raises(TypeError, match="x: expected float32 or float64"):
        mlp_scan(x.bfloat16(), memory, in_weight, weights, inner, out_weight, out_bias)
