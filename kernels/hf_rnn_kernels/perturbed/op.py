"""`hf_rnn::perturbed_linear` and what is made of it."""

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.operators import backend, operator
from hf_rnn_kernels.perturbed import reference


def perturbed_linear(x: Tensor, weight: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + (x right_m) left_m^T + b for M members in one pass, each with rows of its own.

    With left = eps / sqrt(K) A, right = B and, for antithetic pairs, the same with -A as further members this is
    W + eps / sqrt(K) A B^T. No gradients: it is what replaces them.

    Args:
        x: (R, ..., I), floating; R a multiple of M, a member's rows consecutive.
        weight: (O, I), in the dtype of x.
        left, right: (M, O, K) and (M, I, K), any floating dtype.
        bias: (O,), or (M, O) with one for each member.

    Returns:
        (R, ..., O), like x.

    Raises:
        ValueError: shapes that do not fit, named in the message.
        RuntimeError: an argument requires gradients, and they are enabled.
    """
    members = _check(x.shape[0], weight, left, right)
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected shape (O, {x.shape[-1]}) for this x, got {tuple(weight.shape)}")
    rows = x.reshape(members, x[:1].numel() // x.shape[-1] * (x.shape[0] // members), x.shape[-1])
    y = _linear(rows, weight, left, right)
    if bias is not None:
        if bias.shape not in ((weight.shape[0],), (members, weight.shape[0])):
            raise ValueError(f"bias: expected shape (O,) or (M, O), got {tuple(bias.shape)}")
        y += bias.to(y.dtype) if bias.dim() == 1 else bias.to(y.dtype)[:, None]
    return y.view(*x.shape[:-1], weight.shape[0])


def perturbed_embedding(ids: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rows of W + left_m right_m^T: the embedding to which `perturbed_linear` with the same factors is the tied head.

    Args:
        ids: (R, ...), integers; R a multiple of M, a member's rows consecutive.
        weight: (V, O). left, right: (M, V, K) and (M, O, K), any floating dtype.

    Returns:
        (R, ..., O) in the dtype of weight.

    Raises:
        ValueError: shapes that do not fit, named in the message.
        RuntimeError: an argument requires gradients, and they are enabled.
    """
    members = _check(ids.shape[0], weight, left, right)
    return reference.embedding(ids.reshape(members, -1), weight, left, right).view(*ids.shape, weight.shape[1])


def _check(rows: int, weight: Tensor, left: Tensor, right: Tensor) -> int:
    members, rank = left.shape[0], left.shape[-1]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, left, right)):
        raise RuntimeError("perturbed weights have no gradients: call this under torch.no_grad()")
    if left.shape != (members, weight.shape[0], rank):
        raise ValueError(f"left: expected shape (M, {weight.shape[0]}, K), got {tuple(left.shape)}")
    if right.shape != (members, weight.shape[1], rank):
        raise ValueError(f"right: expected shape {(members, weight.shape[1], rank)}, got {tuple(right.shape)}")
    if rows % members:
        raise ValueError(f"x: expected a multiple of M = {members} rows, got {rows}")
    return members


def _shapes(x, weight, left, right):
    return x.new_empty(*x.shape[:2], weight.shape[0])


@operator("perturbed_linear", fake=_shapes)
def _linear(x: Tensor, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (M, N, I), weight (O, I), left (M, O, K), right (M, I, K) to (M, N, O)."""
    small = x.device.type == "cpu" and not threads.worthwhile(x)
    return (reference if small else backend(__package__, x)).linear(x, weight, left, right)
