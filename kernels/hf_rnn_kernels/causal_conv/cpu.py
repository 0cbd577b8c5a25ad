"""CPU backend of causal_conv: rows are time steps; those that a row needs are in the cache still."""

import torch
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import empty, flat, rows_apart
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import F32, U, parallel, row

_SHARE = 512  # rows whose weight gradients are summed one after another: more threads, smaller rounding errors


@row
# As four `addcmul` on shifted views, forward and backward took 18.7 to 28.5 ms at (8, 512, 384) and depended on fresh
# memory; as one pass 3.5 to 4.1.
def _add_product(width, a, a0, b, b0, y, y0):
    for d in range(width):
        y[y0 + d] += a[a0 + d] * b[b0 + d]


@parallel
def _rows_forward(sizes, reverse, x_rows, before, weight, bias, y):
    """`weight` is (K, D). Times t count tokens as they are read."""
    (time, taps, width), (x, apart) = sizes, x_rows
    history = taps - U(1)
    for i in prange(y.size // width):
        at, n = U(i) * width, U(i) // time
        t = (n + U(1)) * time - U(1) - U(i) if reverse else U(i) - n * time
        for d in range(width):
            y[at + d] = bias[d]
        for j in range(taps):
            if t + j < history:
                _add_product(width, weight, j * width, before, (n * history + t + j) * width, y, at)
            else:
                source = U(i) + history - j if reverse else U(i) + j - history
                _add_product(width, weight, j * width, x, source * apart, y, at)


@parallel
def _rows_backward(sizes, reverse, x_rows, before, weight, grad, grad_x, grad_before, sums):
    """`sums` is (shares, K + 1, D): gradients of the weight and the bias, each share of the rows for itself."""
    (time, taps, width), (x, apart) = sizes, x_rows
    history, rows = taps - U(1), U(grad.size) // width
    shares = U(sums.size) // ((taps + U(1)) * width)
    for share in prange(shares):
        to = U(share) * (taps + U(1)) * width
        for i in range(rows * U(share) // shares, rows * (U(share) + U(1)) // shares):
            at, n = i * width, i // time
            t = (n + U(1)) * time - U(1) - i if reverse else i - n * time
            # Each row gathers its gradient instead of adding to others': no two threads write the same row.
            for d in range(width):
                grad_x[at + d] = F32(0)
            for j in range(taps):  # x_t is in y_{t + history - j} with weight j
                if t + history - j < time:
                    later = i + j - history if reverse else i + history - j
                    _add_product(width, weight, j * width, grad, later * width, grad_x, at)
            for j in range(taps):
                if t + j < history:
                    _add_product(width, grad, at, before, (n * history + t + j) * width, sums, to + j * width)
                else:
                    source = i + history - j if reverse else i + j - history
                    _add_product(width, grad, at, x, source * apart, sums, to + j * width)
            for d in range(width):
                sums[to + taps * width + d] += grad[at + d]
            if t == U(0):  # what is before, with the first row
                for s in range(history):
                    for j in range(s + U(1)):
                        if s - j < time:
                            place, row = (n * history + s) * width, i + j - s if reverse else i + s - j
                            _add_product(width, weight, j * width, grad, row * width, grad_before, place)


def _sizes(x: Tensor, weight: Tensor) -> tuple[U, U, U]:
    return U(x.shape[1]), U(weight.shape[1]), U(x.shape[2])


def forward(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    y = empty(*x.shape)
    x_rows = rows_apart(x.flatten(0, 1))
    run(_rows_forward, _sizes(x, weight), reverse, x_rows, flat(before), flat(weight.t()), flat(bias), flat(y))
    return y


def backward(
    x: Tensor, before: Tensor, weight: Tensor, grad: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels, taps = weight.shape
    grad_x, grad_before = empty(*x.shape), torch.zeros(before.shape)
    shares = max(torch.get_num_threads(), x.shape[0] * x.shape[1] // _SHARE)
    sums = torch.zeros(shares, taps + 1, channels)
    run(
        _rows_backward, _sizes(x, weight), reverse, rows_apart(x.flatten(0, 1)), flat(before), flat(weight.t()),
        flat(grad), flat(grad_x), flat(grad_before), flat(sums),
    )  # fmt: skip
    return grad_x, grad_before, sums[:, :-1].sum(0).t().contiguous(), sums[:, -1].sum(0)
