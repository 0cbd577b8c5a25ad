"""CPU backend of gated_norm: rows of channels, head by head."""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from hf_rnn_kernels.arrays import empty, rows_apart
from hf_rnn_kernels.threads import run
from hf_rnn_kernels.vector_math import F32, ONE, U, parallel, sigmoids, sums


@sums
def statistics(size, h, at, eps):
    """Mean and 1 / standard deviation."""
    total, square = F32(0), F32(0)
    for d in range(size):
        total += h[at + d]
    # Squares in a second pass: the mean of squares less the square of the mean cancels. The row is in cache.
    mean = total / F32(size)
    for d in range(size):
        square += (h[at + d] - mean) * (h[at + d] - mean)
    return mean, ONE / np.sqrt(square / F32(size) + eps)


@parallel
def _rows_forward(sizes, h, gate_rows, weight, eps, y):
    (heads, size), (gate, apart) = sizes, gate_rows
    for i in prange(y.size // (heads * size)):
        for k in range(heads):
            at, w = (U(i) * heads + k) * size, k * size
            mean, scale = statistics(size, h, at, eps)
            for d in range(size):
                y[at + d] = sigmoids(gate[U(i) * apart + w + d])[1] * (weight[w + d] * ((h[at + d] - mean) * scale))


@sums
def _means(size, grad, normed):
    total, product = F32(0), F32(0)
    for d in range(size):
        total += grad[d]
    for d in range(size):
        product += grad[d] * normed[d]
    return total / F32(size), product / F32(size)


@parallel
def _rows_backward(sizes, h, gate_rows, weight, eps, grad, grad_h, grad_gate, grad_weight):
    """With n the normed h and t = grad * sigmoid * weight: dh = (t - mean(t) - n mean(t n)) / deviation."""
    (heads, size), (gate, apart) = sizes, gate_rows
    shares, channels = U(grad_weight.size) // (heads * size), heads * size
    rows = U(h.size) // channels
    for share in prange(shares):
        # Computed again: the forward pass keeps nothing.
        normed, t = np.empty(size, np.float32), np.empty(size, np.float32)
        for i in range(rows * U(share) // shares, rows * (U(share) + U(1)) // shares):
            for k in range(heads):
                at, w, to = i * channels + k * size, k * size, U(share) * channels + k * size
                mean, scale = statistics(size, h, at, eps)
                for d in range(size):
                    normed[d] = (h[at + d] - mean) * scale
                for d in range(size):
                    is_closed, is_open = sigmoids(gate[i * apart + w + d])
                    t[d] = grad[at + d] * is_open
                    grad_gate[at + d] = t[d] * is_closed * weight[w + d] * normed[d]
                # A loop of its own: LLVM gives up on one that writes to several arrays that might overlap.
                for d in range(size):
                    grad_weight[to + d] += t[d] * normed[d]
                for d in range(size):
                    t[d] *= weight[w + d]
                mean_t, mean_tn = _means(size, t, normed)
                for d in range(size):
                    grad_h[at + d] = scale * (t[d] - mean_t - normed[d] * mean_tn)


def _flat(x: Tensor) -> np.ndarray:
    return x.detach().reshape(-1).numpy()


def forward(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = empty(*gate.shape)
    sizes = U(h.shape[-2]), U(h.shape[-1])
    run(_rows_forward, sizes, _flat(h), rows_apart(gate.flatten(0, -2)), _flat(weight), F32(eps), _flat(y))
    return y


def backward(h: Tensor, gate: Tensor, weight: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_h, grad_gate = empty(*h.shape), empty(*gate.shape)
    grad_weight = torch.zeros(torch.get_num_threads(), weight.shape[0])
    run(
        _rows_backward, (U(h.shape[-2]), U(h.shape[-1])), _flat(h), rows_apart(gate.flatten(0, -2)), _flat(weight),
        F32(eps), _flat(grad), _flat(grad_h), _flat(grad_gate), _flat(grad_weight),
    )  # fmt: skip
    return grad_h, grad_gate, grad_weight.sum(0)
