"""Quantisation, the density of weights, and both coders, compiled and in numpy."""

import dataclasses
import hashlib
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy import stats

from hf_rnn_kernels import threads
from hf_rnn_kernels.coding import (
    CODERS,
    CorruptPayloadError,
    GeneralizedGaussian,
    decode_tensor,
    dequantize,
    dequantize_rows,
    encode_rows,
    encode_tensor,
    entropy,
    exp_golomb,
    quantize,
    quantize_rows,
    quantize_trellis,
    read_header,
    row_exponents,
    store_tensor,
)
from hf_rnn_kernels.coding.payload import CHUNK

BOTH = pytest.mark.parametrize("coder", ["ans", "exp_golomb"])


def sample(nu: float, n: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.gamma(1 / nu, size=n) ** (1 / nu) * rng.choice([-1, 1], n) * scale)


class TestGeneralizedGaussian:
    @pytest.mark.parametrize(
        "nu, tolerance", [(0.3, 0.03), (0.5, 0.03), (0.8, 0.03), (1.0, 0.03), (1.5, 0.03), (2.0, 0.06)]
    )
    def test_shape(self, nu, tolerance):
        for seed in range(5):
            found = GeneralizedGaussian.fit(sample(nu, 100_000, seed, 0.02))
            assert found.shape == pytest.approx(nu, abs=0.03 if nu < 2 else 0.06)
        assert found.scale == pytest.approx(0.02, rel=0.3 if nu < 0.5 else 0.1)

    @pytest.mark.parametrize("nu", [0.3, 0.7, 1.0, 2.0, 3.0])
    def test_against_scipy(self, nu):
        ours, theirs = GeneralizedGaussian(nu, 0.7), stats.gennorm(nu, scale=0.7)
        x = torch.linspace(0, 5, 50, dtype=torch.float64)
        np.testing.assert_allclose(ours.log_density(-x), theirs.logpdf(-x.numpy()), rtol=1e-10)
        np.testing.assert_allclose(ours.upper_tail(x), theirs.sf(x.numpy()), rtol=1e-6, atol=1e-300)

    @pytest.mark.parametrize("nu", [0.4, 0.7, 1.0, 1.5, 2.0])
    @pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
    def test_rate_is_the_entropy_of_quantised_samples(self, nu, bits):
        """Within 2%, at a step where it is about so many bits."""
        x = sample(nu, 1_000_000)
        density, low, high = GeneralizedGaussian(nu, 1.0), -12.0, 12.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if density.bits(2.0**middle) > bits else (low, middle)
        step = 2.0**low
        q = torch.round(x / step).long()
        _, counts = torch.unique(q, return_counts=True)
        p = counts.double() / len(x)
        measured = float(-(p * p.log2()).sum()) + (len(counts) - 1) / (2 * len(x) * math.log(2))  # Miller and Madow
        assert density.bits(step) == pytest.approx(measured, rel=0.02)

    def test_fine_steps(self):
        """Where all is in the tail's closed form: the differential entropy less the step's logarithm."""
        for nu in (0.5, 1.0, 2.0):
            expected = stats.gennorm(nu).entropy() / math.log(2) + 16
            assert GeneralizedGaussian(nu, 1.0).bits(2.0**-16) == pytest.approx(expected, rel=1e-6)

    def test_degenerate(self):
        assert GeneralizedGaussian.from_moments(0.0, 0.0).bits(0.1) == pytest.approx(0.0, abs=1e-6)
        assert GeneralizedGaussian.fit(torch.ones(9)).shape == 3.0
        with pytest.raises(ValueError, match="finite"):
            GeneralizedGaussian.from_moments(math.nan, 1.0)


class TestQuantization:
    def test_rounds(self):
        x = torch.randn(1000)
        assert torch.equal(quantize(x, -4), torch.round(x * 16).int())
        assert (dequantize(quantize(x, -4), -4) - x).abs().max() <= 2**-5

    def test_a_rate_saves_bits(self):
        """And each symbol is the best of its two by the cost written out."""
        x = torch.randn(20_000) * 0.2
        rounded, chosen = quantize(x, -3), quantize(x, -3, 0.5)
        assert entropy(chosen) < 0.95 * entropy(rounded)
        counts = {int(v): int((rounded == v).sum()) for v in rounded.unique()}
        for i in range(300):
            r, q = float(x[i]) * 8, int(rounded[i])
            costs = {c: (r - c) ** 2 + 0.5 * -math.log2(counts.get(c, 1) / len(x)) for c in (q, q - int(np.sign(q)))}
            assert int(chosen[i]) == min(costs, key=costs.__getitem__)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, bad):
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize(torch.tensor([1.0, bad]), -3)

    @pytest.mark.parametrize("quantizer", [quantize, quantize_trellis])
    def test_curvature(self, quantizer):
        """Errors are smaller where they matter more; its unit does not matter, and zeros everywhere are none."""
        x, c = torch.randn(4000), torch.ones(4000)
        c[::2] = 9.0
        q = quantizer(x, -1, 0.3, c)
        error = (dequantize(q, -1) - x).square()
        assert error[::2].mean() < 0.9 * error[1::2].mean()
        assert torch.equal(q, quantizer(x, -1, 0.3, 4 * c))
        assert torch.equal(quantizer(x, -1, 0.3, 0 * c), quantizer(x, -1, 0.3))
        for bad in (c[1:], -c, c / 0):
            with pytest.raises(ValueError, match="curvature"):
                quantizer(x, -1, 0.3, bad)
        with pytest.raises(ValueError, match="rate"):
            quantizer(x, -1, math.inf)

    def test_too_fine(self):
        with pytest.raises(ValueError, match="exponent: .*2\\^24"):
            quantize(torch.tensor([1.0]), -25)


def adversarial():
    generator = torch.Generator().manual_seed(0)
    outlier = torch.zeros(5000, dtype=torch.int32)
    outlier[77], outlier[78] = 2**24 - 1, -(2**24) + 1
    yield "empty", torch.zeros(0, 3, dtype=torch.int32)
    yield "no dimensions", torch.tensor(-7, dtype=torch.int32)
    yield "one element", torch.tensor([[5]], dtype=torch.int32)
    yield "all zero", torch.zeros(3, 5, dtype=torch.int32)
    yield "all equal, chunks", torch.full((CHUNK + 1,), -3, dtype=torch.int32)
    yield "one outlier", outlier
    yield "all different", torch.randperm(40_000, generator=generator, dtype=torch.int32) - 20_000
    yield "uniform, wide", torch.randint(-(2**24) + 1, 2**24, (999,), generator=generator, dtype=torch.int32)
    yield "whole chunks", torch.randint(-2, 3, (2, CHUNK), generator=generator, dtype=torch.int32)
    yield "transposed", torch.randint(-9, 10, (50, 70), generator=generator, dtype=torch.int32).T


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("q", [pytest.param(q, id=name) for name, q in adversarial()])
def test_bit_exact(q, dtype, coder):
    payload = encode_tensor(q, -9, dtype, coder)
    decoded = decode_tensor(payload)
    assert decoded.dtype == dtype and decoded.shape == q.shape
    assert torch.equal(decoded, dequantize(q, -9, dtype))


@BOTH
@pytest.mark.parametrize("q", [pytest.param(q, id=name) for name, q in adversarial()])
def test_numpy_and_compiled_agree(q, coder, monkeypatch):
    payload = encode_tensor(q, 3, torch.float32, coder)
    monkeypatch.setattr(threads, "available", lambda: False)
    assert torch.equal(encode_tensor(q, 3, torch.float32, coder), payload)
    assert torch.equal(decode_tensor(payload), dequantize(q, 3))


WIDE = st.integers(-(2**24) + 1, 2**24 - 1)


@settings(max_examples=60, deadline=None)
@given(
    q=st_numpy.arrays(np.int32, st.integers(0, 300), elements=WIDE | st.integers(-3, 3)),
    coder=st.sampled_from(["ans", "exp_golomb"]),
    exponent=st.integers(-60, 60),
)
def test_fuzzed(q, coder, exponent):
    q = torch.from_numpy(q)
    assert torch.equal(decode_tensor(encode_tensor(q, exponent, coder=coder)), dequantize(q, exponent))


@pytest.mark.parametrize("nu, scale", [(0.5, 0.5), (1.0, 3.0), (2.0, 20.0), (0.4, 0.01)])
def test_sizes(nu, scale):
    """ANS within 1% of the order-0 entropy, its table and headers included; Exp-Golomb within half a bit."""
    q = torch.round(sample(nu, 1_000_000, scale=scale)).int()
    bits = entropy(q)
    assert bits <= 8 * encode_tensor(q, 0).numel() / q.numel() <= 1.01 * bits + 1e-3
    if bits > 1:  # below, a symbol's whole bit is more
        assert 8 * encode_tensor(q, 0, coder="exp_golomb").numel() / q.numel() <= bits + 0.5


@BOTH
def test_any_flipped_bit_is_found(coder):
    q = torch.randint(-4, 5, (CHUNK + 500,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    payload = encode_tensor(q, -3, coder=coder)
    header, _ = read_header(payload)
    at = [*range(payload.numel() - sum(header.sizes)), *random.Random(0).sample(range(payload.numel()), 60)]
    for i in at:
        damaged = payload.clone()
        damaged[i] ^= 1 << (i % 8)
        with pytest.raises(CorruptPayloadError, match="layers.3"):
            decode_tensor(damaged, "layers.3")
    second = payload.clone()
    second[-1] ^= 1
    with pytest.raises(CorruptPayloadError, match=f"chunk 1 of 2, weights {CHUNK} to {CHUNK + 499}"):
        decode_tensor(second, "w")


@pytest.mark.parametrize("keep", [0, 3, 20, -1])
def test_cut_files(keep):
    payload = encode_tensor(torch.arange(1000, dtype=torch.int32), 0)
    with pytest.raises(CorruptPayloadError):
        decode_tensor(payload[:keep])


def test_a_later_version():
    payload = encode_tensor(torch.arange(10, dtype=torch.int32), 0)
    payload[4] = 9
    with pytest.raises(CorruptPayloadError, match="version 9"):
        decode_tensor(payload)


def test_streams_are_constriction_s():
    """What the compiled decoder reads, the library reads too."""
    from hf_rnn_kernels.coding import ans

    q = torch.round(sample(1.0, 10_000, scale=3.0)).int()
    header, data = read_header(encode_tensor(q, 0))
    assert header.coder == "ans"
    found = ans.decode([data.tobytes()], [10_000], ans.Table.from_bytes(header.table))
    np.testing.assert_array_equal(found, q.numpy())


@pytest.mark.parametrize("most", [2**25, 2**26, 2**30, 2**40])
def test_tables_of_large_tensors(most):
    """The shares, and so the weights, are those of the encoder however often a symbol occurs."""
    from hf_rnn_kernels.coding.ans import Table

    table = Table(np.array([-(2**24), 0, 3, 2**24]), np.array([1, most, 12_345, most // 3]))
    again = Table.from_bytes(table.to_bytes())
    np.testing.assert_array_equal(again.values, table.values)
    np.testing.assert_array_equal(again.frequencies, table.frequencies)
    assert again.frequencies.min() >= 1 and again.frequencies.sum() == 2**24


def test_codes_that_are_too_long():
    with pytest.raises(ValueError, match="u: expected values below"):
        exp_golomb.encode(np.array([2**26]), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (7, 5), (CHUNK + 3,)])
def test_stored_as_it_is(dtype, shape):
    x = (torch.randn(shape) * 9).to(dtype)
    payload = store_tensor(x)
    again = decode_tensor(payload)
    assert again.dtype == dtype and torch.equal(again, x)
    if x.numel():
        payload[-1] ^= 1
        with pytest.raises(CorruptPayloadError, match="w: chunk"):
            decode_tensor(payload, "w")


def forged(**changes) -> torch.Tensor:
    """A payload whose checksum was made to fit."""
    header, data = read_header(encode_tensor(torch.arange(-50, 50, dtype=torch.int32).repeat(50), 0))
    head = dataclasses.replace(header, **changes).to_bytes()
    return torch.from_numpy(np.frombuffer(head + data.tobytes(), np.uint8).copy())


@pytest.mark.parametrize("changes", [dict(order=63), dict(exponent=2000), dict(table=b""), dict(chunk=17)])
def test_forged(changes):
    with pytest.raises(CorruptPayloadError):
        decode_tensor(forged(**changes))


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(coder="huffman"), "coder"),
        (dict(dtype=torch.int8), "dtype"),
        (dict(exponent=200), "exponent"),
        (dict(q=torch.tensor([2**25], dtype=torch.int32)), "q: expected symbols"),
    ],
)
def test_bad_input(change, match):
    with pytest.raises(ValueError, match=match):
        encode_tensor(**dict(q=torch.zeros(3, dtype=torch.int32), exponent=0) | change)


class TestTrellis:
    @pytest.mark.parametrize("compiled", [True, False])
    def test_the_best_path(self, compiled, monkeypatch):
        """Of all paths of six weights, by their sums written out."""
        from hf_rnn_kernels.coding import trellis

        if not compiled:
            monkeypatch.setattr(threads, "available", lambda: False)
        rng = np.random.default_rng(0)
        offset = 12
        bits = (0.7 * np.abs(np.arange(-offset, offset + 1)) + 0.3).astype(np.float32)
        every = np.stack(np.meshgrid(*[np.arange(-4, 5)] * 6, indexing="ij"), -1).reshape(-1, 6)
        allowed, state = np.ones(len(every), bool), np.zeros(len(every), np.int64)
        for t in range(6):  # the trellis from its definition: two parity checks of a shift register
            sets = np.stack([_set(state, b) for b in (0, 1)])
            allowed &= (sets == every[:, t] % 4).any(0)
            state = (2 * state + (sets[1] == every[:, t] % 4)) % 32
        paths = every[allowed]
        assert 0 < len(paths) < len(every) / 30
        for _ in range(5):
            x, w = rng.uniform(-2.5, 2.5, 6).astype(np.float32), rng.uniform(0, 3, 6).astype(np.float32)
            costs = (w * (x - paths) ** 2 + 0.5 * bits[paths + offset]).sum(1)
            found = trellis.search(x, w, bits, np.float32(0.5), np.arange(1))
            np.testing.assert_array_equal(found, paths[costs.argmin()])

    @settings(max_examples=25, deadline=None)
    @given(
        x=st_numpy.arrays(np.float32, st.integers(0, 200), elements=st.floats(-9, 9, width=32)),
        exponent=st.integers(-9, 4),
        rate=st.sampled_from([0.0, 0.1, 5.0]),
    )
    def test_fuzzed(self, x, exponent, rate):
        n = quantize_trellis(torch.from_numpy(x), exponent, rate)
        assert torch.equal(decode_tensor(encode_tensor(n, exponent, coder="trellis")), dequantize(n, exponent))

    def test_numpy_and_compiled_agree(self, monkeypatch):
        """A tensor of two segments, and one with too many distinct symbols for a table."""
        for x, exponent in ((sample(0.7, 4200).float().reshape(60, 70), -1), (sample(2.0, 500, scale=1e5).float(), 1)):
            c = torch.rand_like(x)
            n = quantize_trellis(x, exponent, 0.1, c)
            payload = encode_tensor(n, exponent, torch.bfloat16, "trellis")
            decoded = decode_tensor(payload)
            assert torch.equal(decoded, dequantize(n, exponent, torch.bfloat16))
            with monkeypatch.context() as patch:
                patch.setattr(threads, "available", lambda: False)
                assert torch.equal(quantize_trellis(x, exponent, 0.1, c), n)
                assert torch.equal(encode_tensor(n, exponent, torch.bfloat16, "trellis"), payload)
                assert torch.equal(decode_tensor(payload), decoded)

    @pytest.mark.parametrize("nu, exponent", [(1.0, -3), (1.0, -1), (2.0, -2), (0.6, -2)])
    def test_fewer_bits_at_equal_error(self, nu, exponent):
        """By 3 to 7%, tables included, of what rounding by rate and bits takes."""
        x = sample(nu, 2 * CHUNK + 77, scale=0.6).float()

        def point(e, n, coder):
            error = float((dequantize(n, e) - x).square().mean().log2()) / 2
            return error, 8 * encode_tensor(n, e, coder=coder).numel() / x.numel()

        error, bits = point(exponent, quantize(x, exponent, 0.1), "ans")
        points = [point(e, quantize_trellis(x, e, 0.1), "trellis") for e in (exponent - 1, exponent)]
        (e1, b1), (e2, b2) = points
        assert 0.90 < (b1 + (b2 - b1) * (error - e1) / (e2 - e1)) / bits < 0.972

    def test_chunks(self):
        """Of the second one, the state is 0 again, and damage is found."""
        x = sample(1.0, CHUNK + 5000).float()
        n = quantize_trellis(x, -2)
        payload = encode_tensor(n, -2, coder="trellis")
        assert read_header(payload)[0].coder == "trellis" and payload[4] == 2
        assert torch.equal(decode_tensor(payload), dequantize(n, -2))
        payload[-9] ^= 4
        with pytest.raises(CorruptPayloadError, match="chunk 1 of 2"):
            decode_tensor(payload)

    def test_not_a_path(self):
        with pytest.raises(ValueError, match="q: expected a path"):
            encode_tensor(torch.arange(9, dtype=torch.int32), 0, coder="trellis")
        with pytest.raises(ValueError, match="exponent: .*2\\^22"):
            quantize_trellis(torch.tensor([1.0]), -23)

    def test_tables(self):
        """Frequencies are those of the encoder, to an eighth of an octave of the counts."""
        from hf_rnn_kernels.coding.ans import Table
        from hf_rnn_kernels.coding.trellis_tables import Tables

        every = np.array([-7, -3, 0, 1, 2, 50_000])
        for values, shift in ((every, 0), (every, 9), (np.array([2]), 3), (np.array([-1]), 0)):
            counts = np.array([1, 2**20, 12_345, 3, 999, 17])[: len(values)] << shift
            tables = Tables.of(Table(values, counts))
            again = Tables.from_bytes(tables.to_bytes())
            for a, b in zip(tables.pair, again.pair, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    np.testing.assert_array_equal(a.values, b.values)
                    np.testing.assert_array_equal(a.frequencies, b.frequencies)
                    expected = counts[np.isin(values, a.values)]
                    assert shift or (np.abs(np.log2(a.counts / expected)) <= 1 / 16 + 1e-9).all()


class TestRows:
    """Steps of each row."""

    @settings(max_examples=15, deadline=None)
    @given(
        shape=st.sampled_from([(5, 3), (2, 3, 4), (1, 7), (6, 0), (0, 4)]),
        steps=st.lists(st.integers(-20, -3), min_size=6, max_size=6),
        coder=st.sampled_from(CODERS),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    @example(shape=(6, 0), steps=[-3, -3, -3, -3, -3, -4], coder="ans", dtype=torch.float32)
    def test_fuzzed(self, shape, steps, coder, dtype):
        x, rows = torch.randn(shape) * 0.1, math.prod(shape[:-1])
        exponents = torch.tensor(steps[:rows], dtype=torch.int64)
        q = quantize_rows(x, exponents, 1e-6, torch.rand(shape) + 0.1, coder)
        expected = torch.ldexp(q.float(), exponents.reshape(*shape[:-1], 1)).to(dtype)
        assert torch.equal(dequantize_rows(q, exponents, dtype), expected)
        decoded = decode_tensor(encode_rows(q, exponents, dtype, coder))
        assert decoded.dtype == dtype and torch.equal(decoded, expected)

    def test_damage(self):
        x, exponents = torch.randn(40, 30), torch.arange(40) % 3 - 5
        q = quantize_rows(x, exponents, 1e-4, torch.ones(40, 30), "trellis")
        payload = encode_rows(q, exponents, coder="trellis")
        header, _ = read_header(payload)
        assert header.coder == "rows" and torch.equal(row_exponents(header), exponents)
        assert set(row_exponents(read_header(encode_tensor(q, -3))[0]).tolist()) == {-3}
        for i in random.Random(0).sample(range(payload.numel()), 60):
            damaged = payload.clone()
            damaged[i] ^= 1 << (i % 8)
            with pytest.raises(CorruptPayloadError, match="layers.3"):
                decode_tensor(damaged, "layers.3")
        header, data = read_header(payload)
        for changes in (
            dict(shape=(30, 40)),
            dict(order=2),
            dict(table=b""),
            dict(table=b"\x19\x00" * 9),
            dict(dtype=torch.float16),
        ):
            head = dataclasses.replace(header, **changes).to_bytes()
            with pytest.raises(CorruptPayloadError):
                decode_tensor(torch.from_numpy(np.frombuffer(head + data.tobytes(), np.uint8).copy()))
        with pytest.raises(ValueError, match="exponents"):
            encode_rows(q, torch.arange(40))


def _set(state: np.ndarray, b: int) -> np.ndarray:
    register = 2 * state + b
    low, high = register >> 3, register ^ register >> 2 ^ register >> 5
    return 2 * (high & 1) + (low & 1)


def test_old_payloads():
    """Bytes of the first version, as they were written and are."""
    q = torch.tensor([[0, 1, -2, 0, 0, 3, 0, -1]] * 40, dtype=torch.int32)
    for coder, digest in (("ans", "69b44045e1e25a2b"), ("exp_golomb", "543967ceee409ef2")):
        payload = encode_tensor(q, -4, torch.bfloat16, coder)
        assert payload[4] == 1
        assert hashlib.sha256(payload.numpy()).hexdigest()[:16] == digest
