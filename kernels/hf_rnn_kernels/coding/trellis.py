"""Entropy-coded trellis quantisation: every second multiple of the step at each place, which of them by a state.

Multiples n of the step are split by n mod 4 into four sets. In a state only even or only odd n may follow, and which of
the two sets of these the n is in decides on the next state. A path through the states has spacings of two steps at each
place and yet nearly the error of one: with 32 states 0.2 bits a weight less than rounding at equal error (Marcellin and
Fischer, 1990; entropy-coded, Fischer and Wang, 1992; Ungerboeck's codes for amplitude modulation, 1982).

The path is the one with the smallest error and bits together, by Viterbi's search. This is the code in numpy;
`trellis_cpu.py` has it compiled.
"""

import numpy as np
import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.coding.ans import PRECISION, Table
from hf_rnn_kernels.coding.quantization import check_range, check_rate, entropy
from hf_rnn_kernels.coding.trellis_tables import INPUT, ODD, OUTPUTS, SAMPLE, SEGMENT, STATES, WIDEST, Tables


def quantize_trellis(x: Tensor, exponent: int, rate: float = 0.1, curvature: Tensor | None = None) -> Tensor:
    """The path n through the trellis with the smallest sum of c (x / step - n)^2 / 4 + rate * bits(n).

    Bits are of the ideal codes for even and for odd n, over the tensor, estimated from two searches of a part of it.

    Args:
        x: weights, any shape, floating dtype.
        exponent: of the step, a power of two; n at one place are two steps apart.
        rate: in squares of these two steps a bit. Where steps are fine 0.1 is what a bit is worth by the slope of error
            over bits.
        curvature: c >= 0, x's shape: how much an error matters, in any unit; None: the same everywhere.

    Returns:
        int32, of x's shape: what `encode_tensor(..., coder="trellis")` takes.

    Raises:
        ValueError: a weight that is not finite or 2^22 steps and more from zero, a bad rate or curvature.
    """
    check_range(x, exponent, WIDEST)
    check_rate(rate, x, curvature)
    ratio = (x.detach().cpu().float() * 2.0**-exponent).flatten().numpy()
    if not ratio.size:
        return torch.zeros(x.shape, dtype=torch.int32)
    importance = np.ones_like(ratio)
    if curvature is not None and float(curvature.sum()) > 0:
        c = curvature.detach().cpu().float()
        importance = (c / c.mean()).flatten().numpy()
    offset = int(np.abs(ratio).max()) + 8  # of a table over n: candidates are within 4 of a weight
    counts = np.bincount(np.rint(ratio).astype(np.int64) + offset, minlength=2 * offset + 1).astype(np.float64)
    counts = np.convolve(counts, [0.25, 0.5, 0.25], "same")
    segments = -(-ratio.size // SEGMENT)
    parts = np.unique(np.linspace(0, segments - 1, SAMPLE).astype(np.int64))
    multiplier = np.float32(4 * rate)
    for _ in range(2):
        bits = _bits(counts, offset)
        n = search(ratio, importance, bits, multiplier, parts)
        counts = np.bincount(n[n != _NOT] + offset, minlength=2 * offset + 1).astype(np.float64)
    if segments > len(parts):
        n = search(ratio, importance, _bits(counts, offset), multiplier, np.arange(segments))
    return torch.from_numpy(n).reshape(x.shape)


_NOT = np.iinfo(np.int32).min  # in segments that were left out


def _bits(counts: np.ndarray, offset: int) -> np.ndarray:
    """float32 bits of each n from -offset on, among those of its parity; never seen: a fifth of a time."""
    odd = (np.arange(len(counts)) - offset) % 2
    totals = np.array([counts[odd == u].sum() for u in (0, 1)]) + 1
    return (np.log2(totals)[odd] - np.log2(counts + 0.2)).astype(np.float32)


def search(ratio, importance, bits, multiplier, parts) -> np.ndarray:
    """int32 n with the smallest importance * (ratio - n)^2 + multiplier * bits[n] in those segments; else -2^31."""
    n = np.full(ratio.size, _NOT, np.int32)
    if threads.available():
        from hf_rnn_kernels.coding import trellis_cpu

        trellis_cpu.search(ratio, importance, bits, multiplier, parts, n)
    else:
        _search(ratio, importance, bits, multiplier, parts, n)
    return n


def _search(ratio, importance, bits, multiplier, parts, n) -> None:
    """Viterbi's, all segments side by side."""
    places = parts[:, None] * SEGMENT + np.arange(SEGMENT)
    inside = places < ratio.size
    places = np.minimum(places, ratio.size - 1)
    x, w, offset = ratio[places].T, importance[places].T, len(bits) // 2
    half, length = STATES // 2, min(SEGMENT, ratio.size)
    cost = np.full((STATES, len(parts)), 1e30, np.float32)
    cost[0] = 0
    later = np.empty((length, STATES, len(parts)), bool)
    before = np.arange(STATES) >> 1
    for t in range(length):
        branch = np.stack([_nearest(x[t], w[t], bits, offset, multiplier, j)[0] for j in range(4)])
        branch[:, ~inside[:, t]] = 0
        first = cost[before] + branch[OUTPUTS[before, np.arange(STATES) & 1]]
        second = cost[before + half] + branch[OUTPUTS[before + half, np.arange(STATES) & 1]]
        later[t] = second < first
        cost = np.where(later[t], second, first)
        if t % 32 == 0:
            cost = cost - cost.min(0)
    state, lanes = cost.argmin(0), np.arange(len(parts))
    for t in range(length - 1, -1, -1):
        previous = before[state] + half * later[t, state, lanes]
        sets = OUTPUTS[previous, state & 1]
        found = np.zeros(len(parts), np.int32)
        for j in range(4):
            found = np.where(sets == j, _nearest(x[t], w[t], bits, offset, multiplier, j)[1], found)
        n[places[inside[:, t], t]] = found[inside[:, t]]
        state = previous


def _nearest(x, w, bits, offset, multiplier, j) -> tuple[np.ndarray, np.ndarray]:
    """Cost and n of the best of the set n mod 4 = j: of the two around x, and of zero."""
    below = (np.floor((x - np.float32(j)) * np.float32(0.25)) * 4).astype(np.int32) + np.int32(j)
    candidates = [below, below + 4] + ([np.zeros_like(below)] if j == 0 else [])
    best, n = np.full_like(x, 1e30), below
    for candidate in candidates:
        d = x - candidate.astype(np.float32)
        cost = w * d * d + multiplier * bits[candidate + offset]
        n = np.where(cost < best, candidate, n)
        best = np.minimum(cost, best)
    return best, n


def follow(n: np.ndarray) -> np.ndarray:
    """uint8: whether n is odd at each place, by the state; 2 where the path is left."""
    if threads.available():
        from hf_rnn_kernels.coding import trellis_cpu

        return trellis_cpu.follow(n)
    found = np.empty(n.size, np.uint8)
    for start in range(0, n.size, SEGMENT):
        s = 0
        for i in range(start, min(start + SEGMENT, n.size)):
            found[i] = ODD[s] if n[i] & 1 == ODD[s] else 2
            s = (2 * s + INPUT[s, n[i] >> 1 & 1]) % STATES
    return found


def encode(chunks: list[np.ndarray], odd: list[np.ndarray], tables: Tables) -> list[bytes]:
    """Each chunk of n as words of an ANS, as constriction's `AnsCoder` would with a model for each parity."""
    if threads.available():
        from hf_rnn_kernels.coding import trellis_cpu

        return trellis_cpu.encode(chunks, odd, tables)
    shares: list[dict[int, tuple[int, int]]] = [{}, {}]
    for share, table in zip(shares, tables.pair, strict=True):
        if table is not None:
            frequencies = table.frequencies
            first = (frequencies.cumsum() - frequencies).tolist()
            share |= dict(zip(table.values.tolist(), zip(first, frequencies.tolist(), strict=True), strict=True))
    found = []
    for n, u in zip(chunks, odd, strict=True):
        state, words = 0, []
        # Last in, first out.
        for value, parity in zip(n[::-1].tolist(), u[::-1].tolist(), strict=True):
            left, frequency = shares[parity][value]
            if state >> (64 - PRECISION) >= frequency:
                words.append(state & 0xFFFFFFFF)
                state >>= 32
            state = (state // frequency << PRECISION) + left + state % frequency
        while state:
            words.append(state & 0xFFFFFFFF)
            state >>= 32
        found.append(np.array(words, "<u4").tobytes())
    return found


def decode(chunks: list[bytes], counts: list[int], tables: Tables) -> np.ndarray:
    """The n of all chunks, int64. A damaged path, which checksums find, gives any."""
    known = []
    for table in tables.pair:
        table = table or Table(np.zeros(1, np.int64), np.ones(1, np.int64))
        known.append((table.values.tolist(), np.concatenate([[0], table.frequencies.cumsum()])))
    found = []
    for chunk, count in zip(chunks, counts, strict=True):
        words = np.frombuffer(chunk, "<u4").tolist()
        state, s = 0, 0
        for _ in range(2):
            state = state << 32 | words.pop() if words else state
        for i in range(count):
            s = 0 if i % SEGMENT == 0 else s
            values, cumulative = known[ODD[s]]
            quantile = state & (2**PRECISION - 1)
            at = int(np.searchsorted(cumulative, quantile, side="right")) - 1
            state = (state >> PRECISION) * int(cumulative[at + 1] - cumulative[at]) + quantile - int(cumulative[at])
            if state < 2**32 and words:
                state = state << 32 | words.pop()
            found.append(values[at])
            s = (2 * s + int(INPUT[s, values[at] >> 1 & 1])) % STATES
    return np.array(found, np.int64)


def entropy_trellis(n: Tensor) -> float:
    """Bits a symbol of the ideal codes for even and odd n."""
    parts = (n[n % 2 == u] for u in (0, 1))
    return sum(entropy(part) * part.numel() for part in parts) / max(n.numel(), 1)
