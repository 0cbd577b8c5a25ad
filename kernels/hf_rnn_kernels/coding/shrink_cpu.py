"""The shrinkage of a rate term compiled: one pass over a tensor instead of ten, its power by vectorised exp and log."""

import numpy as np
from numba import prange

from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import F32, U, dot, exp, log, parallel, row

_BLOCK = 4096  # weights, which stay in a core's cache between the sums of squares before and after


@row
def _shrink_block(w, start, count, inverse, epsilon, power, size):
    for i in range(count):
        x = w[start + i]
        p = size * exp(power * log(abs(x) * inverse + epsilon))
        w[start + i] = x - min(max(x, -p), p)


@parallel
def _shrink(w, inverse, epsilon, power, size, before, after):
    for block in prange(before.size):
        start = U(block * _BLOCK)
        count = U(min(_BLOCK, w.size - block * _BLOCK))
        before[block] = dot(count, w, start, w, start)
        _shrink_block(w, start, count, inverse, epsilon, power, size)
        after[block] = dot(count, w, start, w, start)


def shrink(w: np.ndarray, nu: float, r: float, size: float, epsilon: float) -> tuple[float, float]:
    """w <- sign(w) max(|w| - size * nu * (|w| / r + epsilon)^(nu - 1), 0) in place; sums of squares before and after.

    Args:
        w: (N,) float32.
        nu, r, size, epsilon: above 0.
    """
    before = np.empty(-(-w.size // _BLOCK), np.float32)
    after = np.empty_like(before)
    run(_shrink, w, F32(1 / r), F32(epsilon), F32(nu - 1), F32(size * nu), before, after)
    return float(before.sum(dtype=np.float64)), float(after.sum(dtype=np.float64))
