"""causal_conv, in plain torch and fused on a CPU, against torch's grouped convolution in float64."""

import pytest
import torch
from conftest import relative_error

from hf_rnn_kernels import SequenceLayout, causal_conv, threads
from hf_rnn_kernels.causal_conv import reference


def expected(x, state, weight, bias):
    padded = torch.cat([state, x], 1)
    y = torch.nn.functional.conv1d(padded.mT, weight[:, None], bias, groups=bias.shape[0]).mT
    return y, padded[:, x.shape[1] :]


def gradients(function, leaves, grads, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    outputs = function(*leaves)
    kept = [(y, grad.to(dtype)) for y, grad in zip(outputs, grads, strict=True) if y.numel()]
    return [*outputs, *torch.autograd.grad([y for y, _ in kept], leaves, [grad for _, grad in kept])]


@pytest.mark.parametrize(
    "batch, time, channels, taps",
    [(2, 5, 3, 4), (3, 1, 5, 4), (2, 300, 130, 4), (70, 700, 2, 3), (1, 2000, 37, 7), (200, 2, 200, 4), (3, 2, 5, 7)]
    + [(300, 1, 257, 4), (2, 150, 300, 1), (1, 3, 40000, 2)],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_against_float64(batch, time, channels, taps, reverse):
    torch.manual_seed(0)
    shapes = [(batch, time, channels), (batch, taps - 1, channels), (channels, taps), (channels,)]
    leaves = [torch.randn(shape) for shape in shapes]
    assert threads.worthwhile(leaves[0]) == (batch * time * channels >= 2**16)
    grads = [torch.randn(shape) for shape in shapes[:2]]

    def turned(x, *others):
        y, ends = expected(x.flip(1), *others)
        return y.flip(1), ends

    layout = SequenceLayout(reverse=reverse)
    ours = gradients(lambda *x: causal_conv(*x, layout), leaves, grads, torch.float32)
    theirs = gradients(turned if reverse else expected, leaves, grads, torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (not a.numel() or relative_error(a, b) <= 1e-6)


def test_a_slice_of_a_projection():
    projection, weight, bias = torch.randn(2, 500, 3 * 96), torch.randn(96, 4), torch.randn(96)
    x, state = projection[..., 96:192], torch.randn(2, 3, 96)
    for a, b in zip(causal_conv(x, state, weight, bias), causal_conv(x.contiguous(), state, weight, bias), strict=True):
        assert torch.equal(a, b)


def test_other_dtypes_are_torchs():
    for dtype in (torch.bfloat16, torch.float64):
        x, state, weight, bias = (torch.randn(shape, dtype=dtype) for shape in [(2, 500, 80), (2, 3, 80), (80, 4), 80])
        y, last = causal_conv(x, state, weight, bias)
        assert torch.equal(y, reference.convolve(x, state.to(x.dtype), weight, bias)[0]) and y.dtype == dtype
        assert last.dtype == torch.promote_types(dtype, torch.float32) and torch.equal(last, x[:, -3:].to(last.dtype))


def test_the_state_does_not_keep_the_sequence():
    for time in (10, 1000):
        x, state, weight, bias = (
            torch.randn(1, time, 100),
            torch.randn(1, 3, 100),
            torch.randn(100, 4),
            torch.randn(100),
        )
        last = causal_conv(x, state, weight, bias)[1]
        assert last.untyped_storage().nbytes() == state.nbytes and last.is_contiguous()
    last = causal_conv(torch.randn(2, 400, 200), torch.randn(2, 0, 200), torch.randn(200, 1), torch.randn(200))[1]
    assert last.shape == (2, 0, 200) and last.untyped_storage().nbytes() == 0


def test_registration():
    leaves = [torch.randn(shape, requires_grad=True) for shape in [(2, 400, 90), (2, 3, 90), (90, 4), (90,)]]
    torch.library.opcheck(torch.ops.hf_rnn.causal_conv.default, leaves)


def test_bad_input():
    good = dict(x=torch.zeros(2, 5, 3), state=torch.zeros(2, 3, 3), weight=torch.zeros(3, 4), bias=torch.zeros(3))
    for name, bad in (("state", torch.zeros(2, 4, 3)), ("weight", torch.zeros(4, 4)), ("bias", torch.zeros(4))):
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            causal_conv(**good | {name: bad})
