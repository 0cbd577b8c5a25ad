"""CPU backend of silu_gate."""

import numpy as np
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import empty
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import ONE, U, parallel, sigmoids

_BLOCK = U(4096)  # numbers of one turn: few enough for the first cache, many enough for what a turn costs


@parallel
def _forward(h, gate, y):
    for i in prange((y.size + _BLOCK - U(1)) // _BLOCK):
        for n in range(U(i) * _BLOCK, min((U(i) + U(1)) * _BLOCK, y.size)):
            y[n] = h[n] * gate[n] * sigmoids(gate[n])[1]


@parallel
def _backward(h, gate, grad, grad_h, grad_gate):
    for i in prange((grad.size + _BLOCK - U(1)) // _BLOCK):
        for n in range(U(i) * _BLOCK, min((U(i) + U(1)) * _BLOCK, grad.size)):
            x, g = gate[n], grad[n]
            not_open, is_open = sigmoids(x)
            grad_h[n] = g * x * is_open
            grad_gate[n] = g * h[n] * is_open * (ONE + x * not_open)


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().reshape(-1).numpy()


def forward(h: Tensor, gate: Tensor) -> Tensor:
    y = empty(*h.shape)
    run(_forward, _flat(h), _flat(gate), _flat(y))
    return y


def backward(h: Tensor, gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_h, grad_gate = empty(*h.shape), empty(*gate.shape)
    run(_backward, _flat(h), _flat(gate), _flat(grad), _flat(grad_h), _flat(grad_gate))
    return grad_h, grad_gate
