"""CPU backend of swiglu."""

import numpy as np
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import empty
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import ONE, U, parallel, sigmoids


@parallel
def _rows_forward(x, size, y):
    for i in prange(y.size // size):
        at = U(i) * size
        for d in range(size):
            gate = x[U(2) * at + d]
            y[at + d] = gate * sigmoids(gate)[1] * x[U(2) * at + size + d]


@parallel
def _rows_backward(x, size, grad, grad_x):
    for i in prange(grad.size // size):
        at = U(i) * size
        for d in range(size):
            gate, g = x[U(2) * at + d], grad[at + d]
            not_open, is_open = sigmoids(gate)
            grad_x[U(2) * at + d] = g * x[U(2) * at + size + d] * is_open * (ONE + gate * not_open)
        for d in range(size):
            gate = x[U(2) * at + d]
            grad_x[U(2) * at + size + d] = grad[at + d] * gate * sigmoids(gate)[1]


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().reshape(-1).numpy()


def forward(x: Tensor) -> Tensor:
    y = empty(*x.shape[:-1], x.shape[-1] // 2)
    run(_rows_forward, _flat(x), U(y.shape[-1]), _flat(y))
    return y


def backward(x: Tensor, grad: Tensor) -> Tensor:
    grad_x = empty(*x.shape)
    run(_rows_backward, _flat(x), U(grad.shape[-1]), _flat(grad), _flat(grad_x))
    return grad_x
