"""`hf_rnn::recurrent_scan`: one operator for torch.compile, torch.export and autograd, and the choice of its backend.

The loops of the backends compute what is sequential: states forward, gradients of pre-activations and states backward.
The gradients of the weight and the bias are matrix products over all tokens at once, after the loop.
"""

import importlib
import importlib.util

import torch
from torch import Tensor

from hf_rnn_kernels import threads
from hf_rnn_kernels.recurrent_scan import reference
from hf_rnn_kernels.recurrent_scan.reference import CELLS, state_dtype

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _backend(x: Tensor):
    """The backend for this tensor's device and dtype, imported when first used."""
    if x.dtype != torch.float64 and x.numel() > 0:
        if x.device.type == "cpu" and threads.available():
            return importlib.import_module("hf_rnn_kernels.recurrent_scan.cpu")
        if x.device.type == "cuda" and _HAS_TRITON:  # "cuda" is also what PyTorch calls an AMD GPU
            return importlib.import_module("hf_rnn_kernels.recurrent_scan.triton")
    return reference


@torch.library.custom_op("hf_rnn::recurrent_scan", mutates_args=())
def scan(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence.

    Args:
        cell: a key of `reference.CELLS`, which gives its number of gates G and of state tensors S.
        x: (B, T, H * G * P), the input's part of the pre-activations.
        weight: (H, G * P, P).
        bias: (H * G * P), added to R h.
        states: initial states, S tensors (N, D), h the first; empty for zeros. N is B, or the number of packed
            sequences; D = H * P.
        mask: (B, T), zero where a token is padding: its state is its predecessor's.
        cu_seqlens: (N + 1) int offsets of the sequences packed in a batch of one.
        training: whether a backward pass follows, which needs the other states.

    Returns:
        h (B, T, D) in the dtype of x; the other states (B, T, S - 1, D) in float32 if training, else (B, T, 0, D);
        the last states (S, N, D) in float32 (float64 for float64 inputs).
    """
    return _backend(x).scan(cell, x, weight, bias, states, mask, cu_seqlens, training)


@scan.register_fake
def _(cell, x, weight, bias, states, mask, cu_seqlens, training):
    batch, time, _ = x.shape
    units = weight.shape[0] * weight.shape[2]
    count = CELLS[cell].states
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = state_dtype(x)
    return (
        x.new_empty(batch, time, units),
        x.new_empty(batch, time, count - 1 if training else 0, units, dtype=dtype),
        x.new_empty(count, sequences, units, dtype=dtype),
    )


@torch.library.custom_op("hf_rnn::recurrent_scan_backward", mutates_args=())
def scan_backward(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    others: Tensor,
    grad: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk back in time: from the gradients of h (B, T, D) and of the last states (S, N, D) to those of x
    (B, T, H * G * P), of R h + b where they are others than x's (B, T, H * g * P, the last g gates), and of the initial
    states (S, N, D). `h` and `others` are what `scan` returned; gates are computed again from them."""
    return _backend(x).scan_backward(cell, x, weight, bias, states, mask, cu_seqlens, h, others, grad, grad_last)


@scan_backward.register_fake
def _(cell, x, weight, bias, states, mask, cu_seqlens, h, others, grad, grad_last):
    own = CELLS[cell].own_recurrent_grads
    return x.new_empty(x.shape), x.new_empty(*x.shape[:2], own * h.shape[2]), grad_last.new_empty(grad_last.shape)


def _setup_context(ctx, inputs, output) -> None:
    cell, x, weight, bias, states, mask, cu_seqlens, training = inputs
    if not training:
        raise RuntimeError("hf_rnn::recurrent_scan: called with training=False on tensors that require gradients")
    ctx.cell = cell
    ctx.save_for_backward(x, weight, bias, mask, cu_seqlens, output[0], output[1], *states)


def _backward(ctx, grad, grad_others, grad_last):
    x, weight, bias, mask, cu_seqlens, h, others, *states = ctx.saved_tensors
    grad_x, own, grad_states = scan_backward(
        ctx.cell, x, weight, bias, states, mask, cu_seqlens, h, others, grad, grad_last
    )
    heads, rows, size = weight.shape
    shared = rows - CELLS[ctx.cell].own_recurrent_grads * size
    parts = [grad_x.view(-1, heads, rows)[:, :, :shared], own.reshape(grad_x.shape[0] * grad_x.shape[1], heads, -1)]
    h0 = states[0] if states else None
    grad_weight = grad_bias = None
    if ctx.needs_input_grad[2]:
        first = _first_tokens(x, cu_seqlens)
        grad_weight = torch.cat([_grad_weight(d, h.reshape(-1, heads, size), h0, *first) for d in parts], 1)
        grad_weight = grad_weight.to(weight.dtype)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = torch.cat([d.sum(0, dtype=grad_states.dtype) for d in parts], 1).flatten().to(bias.dtype)
    grads = [g.to(s.dtype) for g, s in zip(grad_states, states, strict=False)]
    return None, grad_x, grad_weight, grad_bias, grads, None, None, None


def _first_tokens(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Row of each sequence's first token among the B * T, and where sequences may be empty, which are not."""
    if cu_seqlens is None:
        return torch.arange(x.shape[0], device=x.device) * x.shape[1], None
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    return starts.clamp(max=max(x.shape[1] - 1, 0)), stops > starts


def _grad_weight(d: Tensor, h: Tensor, h0: Tensor | None, first: Tensor, real: Tensor | None) -> Tensor:
    """sum_t d_t h_{t-1}^T for each head: d (rows, H, m) and h (rows, H, P) to (H, m, P).

    One product over all rows, d shifted by one against h, which pairs the first token of a sequence with the last of
    the one before; a small product puts its initial state in that place.
    """
    if d.numel() == 0:
        return h.new_zeros(h.shape[1], d.shape[2], h.shape[2])
    total = torch.bmm(d[1:].permute(1, 2, 0), h[:-1].transpose(0, 1))
    dtype = state_dtype(h)
    wrong = (h[(first - 1).clamp(min=0)] * (first > 0)[:, None, None]).to(dtype)
    right = wrong.new_zeros(wrong.shape) if h0 is None else h0.to(dtype).view(wrong.shape)
    start = d[first].to(dtype) if real is None else d[first].to(dtype) * real[:, None, None]
    return total + torch.bmm(start.permute(1, 2, 0), (right - wrong).transpose(0, 1))


scan.register_autograd(_backward, setup_context=_setup_context)
