"""CPU backend: to what a matrix product gave, one pass adds the low-rank part row by row."""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import flat
from hf_rnn_kernels.cpu_cache import loop
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import U, dot, sums

# Sums over a row may be taken in any order, so that they vectorise
_parallel = loop(fastmath={"contract", "nsz", "reassoc"}, error_model="numpy", parallel=True)


@sums
def add(size, y, y0, factor, x, x0):
    for d in range(size):
        y[y0 + d] += factor * x[x0 + d]


@_parallel
def _add_low_rank(rows, rows_per_member, rank, x, x_size, left, right, y, y_size):
    """y_r += (x_r right_m) left_m^T; left (M, K, O), right (M, K, I)."""
    for r in prange(rows):
        row = U(r)
        first = row // rows_per_member * rank
        # After the product, a row at a time: 1 to 8% of it; as torch calls 8 to 30%.
        for k in range(first, first + rank):
            add(y_size, y, row * y_size, dot(x_size, x, row * x_size, right, k * x_size), left, k * y_size)


def linear(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """See `reference.linear`; x in float32."""
    # All members' rows as one matrix, which is what makes many copies cheap.
    y = torch.nn.functional.linear(x, weight)
    rows = np.int64(x.shape[0] * x.shape[1])
    run(
        _add_low_rank, rows, U(x.shape[1]), U(left.shape[2]), flat(x), U(x.shape[2]),
        flat(left.transpose(1, 2)), flat(right.transpose(1, 2)), y.view(-1).numpy(), U(y.shape[2]),
    )  # fmt: skip
    return y
