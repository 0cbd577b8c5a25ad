"""Packed weights: what packing keeps, and products straight from the integers against plain ones in float64."""

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_rnn_kernels.packed_linear import PackedLinear, choose_group, is_exact, pack, packed_linear, reference, unpack

sizes = st.integers(1, 40)


def weights(outputs, inputs, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def rounded(x, bits, group):
    """x (N, I) as few rows are multiplied, in float64: of each block, whole multiples of a 32767th of its largest."""
    each = 256 if bits == 8 and group == x.shape[1] else group
    x = x.double()
    for at in range(0, x.shape[1], each):
        block = x[:, at : at + each]
        most = block.abs().amax(1, keepdim=True).clamp(min=1e-30)
        times = (32767 / most.float()).double()
        block.copy_((block * times).round() * (most / 32767).float().double())
    return x


@given(sizes, sizes, st.sampled_from([8, 4]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_packing_rounds_to_the_nearest(outputs, inputs, bits, seed):
    inputs *= 2
    weight = weights(outputs, inputs, seed)
    packed, scale = pack(weight, bits)
    group = inputs // scale.shape[1]
    assert packed.shape == (outputs, inputs * bits // 8) and packed.dtype == torch.uint8
    assert group == choose_group(inputs, bits, None)
    assert group == inputs or (bits == 4 and group >= 64)
    error = (unpack(packed, scale, bits) - weight).abs().unflatten(1, (-1, group))
    assert (error <= scale[..., None] * 0.5001).all()


@given(sizes, sizes, st.sampled_from([8, 4]), st.integers(-20, 20), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_what_fits_is_kept_bit_for_bit(outputs, inputs, bits, exponent, seed):
    """Multiples of a power of two, a coded checkpoint's weights: also rows of zeros, and rows that use few integers."""
    most = 2 ** (bits - 1) - 1
    q = torch.randint(-most, most + 1, (outputs, 2 * inputs), generator=torch.Generator().manual_seed(seed))
    q[seed % outputs] //= 5
    q[0, 0], q[-1] = most, 0
    weight = q * 2.0**exponent
    assert is_exact(weight, bits)
    assert torch.equal(unpack(*pack(weight, bits), bits), weight)
    weight[0, 0] *= 1 + 2**-20
    assert not weight[0, 0] or not is_exact(weight, bits)


@pytest.mark.parametrize("bits, group", [(8, None), (8, 4), (8, 26), (4, None), (4, 2), (4, 26), (4, 52)])
@pytest.mark.parametrize("rows", [0, 1, 3, 9, 130])
def test_product_and_gradient(bits, group, rows):
    layer = PackedLinear.of(nn.Linear(156, 71), bits, group)
    plain = layer.dequantize().double()
    x = weights(rows, 156).requires_grad_()
    y = layer(x)
    exact = x.detach().double().requires_grad_()
    expected = plain(exact)
    assert y.shape == (rows, 71)
    grad = weights(rows, 71, 1)
    (dx,) = torch.autograd.grad(y, x, grad)
    (expected_dx,) = torch.autograd.grad(expected, exact, grad.double())
    if rows:
        value = plain(rounded(x.detach(), bits, 156 // layer.scale.shape[1])) if rows <= 8 else expected
        assert relative_error(y, value) < 1e-6
        assert relative_error(dx, expected_dx) < 1e-6


@pytest.mark.parametrize("bits, group", [(8, None), (8, 64), (4, None), (4, 128)])
def test_rounding_activations_costs_little_beside_rounding_weights(bits, group):
    weight, x = weights(40, 640), weights(2, 640, 1)
    x[:, 77] = 10  # an outlier costs its block alone
    packed, scale = pack(weight, bits, group)
    exact = x.double() @ unpack(packed, scale, bits).double().t()
    error = relative_error(packed_linear(x, packed, scale, bits), exact)
    assert 1e-7 < error < relative_error(exact, x.double() @ weight.double().t()) / 100
    known = rounded(x, bits, 640 // scale.shape[1]) @ unpack(packed, scale, bits).double().t()
    assert relative_error(packed_linear(x, packed, scale, bits), known) < 1e-6


@pytest.mark.parametrize("bits, most", [(8, 127), (4, 7)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(bits, most, sign):
    for group in (3998, 4000, 16384):  # the largest groups of whole numbers, and one that stays in floats
        weight = torch.full((3, 2 * group), float(sign * most))
        y = packed_linear(torch.full((1, 2 * group), 1e30), *pack(weight, bits, group), bits)
        assert relative_error(y, torch.full((1, 3), sign * most * 2 * group * 1e30, dtype=torch.float64)) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_stays_so(bits):
    packed, scale = pack(weights(3, 512), bits)
    for number in (float("nan"), float("inf"), -float("inf")):
        x = weights(2, 512)
        x[1, 300] = number
        y = packed_linear(x, packed, scale, bits)
        assert y[0].isfinite().all() and not y[1].isfinite().any()
    assert not packed_linear(torch.zeros(1, 512), packed, scale, bits).any()
    assert relative_error(packed_linear(x[:1] * 1e-30, packed, scale, bits) * 1e30, y[:1]) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_a_block_at_a_time(bits, monkeypatch):
    """More blocks than one, the last one smaller; both backends; other dtypes."""
    from hf_rnn_kernels.packed_linear import cpu

    for module in (cpu, reference):
        monkeypatch.setattr(module, "blocks", lambda packed, bits: [slice(n, n + 7) for n in range(0, len(packed), 7)])
    packed, scale = pack(weights(31, 64), bits)
    x, plain = weights(10, 64, 3), unpack(packed, scale, bits).double()
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        y = packed_linear(x.to(dtype)[None], packed, scale, bits)
        assert y.dtype == dtype and y.shape == (1, 10, 31)
        assert relative_error(y[0], x.double() @ plain.t()) < bound


def test_compiled_and_exported():
    layer = PackedLinear.of(nn.Linear(16, 5), 8)
    x = weights(3, 16)
    torch.library.opcheck(torch.ops.hf_rnn.packed_linear, (x, layer.packed, layer.scale, 8))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_nothing_can_be_merged_into_it():
    layer = PackedLinear.of(nn.Linear(16, 5), 8)
    assert layer.weight.shape == (5, 16) and layer.weight.isnan().all()
    with pytest.raises(RuntimeError, match="single memory location"):
        layer.weight.data += torch.ones(5, 16)


def test_bad_input():
    for bits in (3, 16, True, "8", 8.5):
        with pytest.raises(ValueError, match="bits: expected 8 or 4, got"):
            pack(weights(2, 8), bits)
    for group in (1, 0, -4, 2.0, True):
        with pytest.raises(ValueError, match="group_size: expected an integer of at least 2"):
            pack(weights(2, 8), 8, group)
    with pytest.raises(ValueError, match="group_size: expected a divisor of the 8 inputs of weight, got 3"):
        pack(weights(2, 8), 8, 3)
    with pytest.raises(ValueError, match="group_size: expected an even divisor of the 9 inputs of layer, got 3"):
        choose_group(9, 4, 3, "layer")
    with pytest.raises(ValueError, match="layer: 4 bits want an even number of inputs, got 9"):
        choose_group(9, 4, None, "layer")
    packed, scale = pack(weights(2, 8), 8)
    with pytest.raises(ValueError, match=r"x: expected \(..., 8\), got \(3, 7\)"):
        packed_linear(weights(3, 7), packed, scale, 8)
    with pytest.raises(ValueError, match=r"scale: expected \(O, I / group_size\)"):
        packed_linear(weights(3, 8), packed, scale[:1], 8)
