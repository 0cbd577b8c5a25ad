"""rms_norm, fused on a CPU, against torch's in float64."""

import pytest
import torch
from conftest import relative_error

from hf_rnn_kernels import rms_norm


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 333, 384), (7000, 17), (0, 4, 8)])
def test_against_float64(shape):
    x = (3 * torch.randn(shape) + 1).requires_grad_()
    weight = torch.randn(shape[-1], requires_grad=True)
    grad = torch.randn(shape)
    y = rms_norm(x, weight, 1e-6)
    grads = torch.autograd.grad(y, [x, weight], grad)
    double = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.nn.functional.rms_norm(double[0], shape[-1:], double[1], 1e-6)
    expected_grads = torch.autograd.grad(expected, double, grad.double())
    for a, b in zip([y, *grads], [expected, *expected_grads], strict=True):
        assert a.shape == b.shape
        if a.numel():
            # the gradient along a row of one element is zero but for epsilon: compare it absolutely
            assert relative_error(a, b) <= 2e-6 or (a - b).abs().max() < 1e-6


def test_other_dtypes_and_small_inputs_are_torchs():
    weight = torch.randn(8)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(2, 3, 8, dtype=dtype)
        with torch.no_grad():
            expected = torch.nn.functional.rms_norm(x, (8,), weight.to(dtype), 1e-6)
            assert torch.equal(rms_norm(x, weight.to(dtype), 1e-6), expected)


def test_layouts_and_registration():
    x = torch.randn(5000, 4, 6).transpose(0, 1).requires_grad_()
    weight = torch.randn(6, requires_grad=True)
    expected = torch.nn.functional.rms_norm(x, (6,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)
    torch.library.opcheck(torch.ops.hf_rnn.rms_norm.default, (x, weight, 1e-6))


def test_a_weight_of_another_size():
    with pytest.raises(ValueError, match="weight: expected the last dimension"):
        rms_norm(torch.ones(2, 8), torch.ones(4, requires_grad=True), 1e-6)


def test_forward_mode():
    """Refused by the fused loop; a small norm is torch's own, and may; so is a large one under torch.func."""

    def norm(x):
        return rms_norm(x, torch.ones(256), 1e-6)

    x = torch.randn(1, 300, 256)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        norm(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    y, dy = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(y + 1e-3 * dy, norm(x + 1e-3), atol=1e-4, rtol=1e-4)
