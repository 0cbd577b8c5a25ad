"""Gradients of weight and bias, as matrix products over all tokens at once, after a backend's loop over time."""

import torch
from torch import Tensor

from hf_rnn_kernels.recurrent_scan.reference import state_dtype


def weight_gradients(
    grad_x: Tensor,
    own: Tensor,
    weight: Tensor,
    h: Tensor,
    states: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (H, G * P, P) and of R h + b summed over tokens (H * G * P).

    Args:
        grad_x: gradients of the pre-activations (B, T, H * G * P).
        own: of the last gates' part of R h + b, where they are not those of x, (B, T, H * g * P), g >= 0.
        weight, h, states, cu_seqlens, reverse: as in `op.scan_backward`.
    """
    heads, rows, size = weight.shape
    tokens = grad_x.shape[0] * grad_x.shape[1]
    own = own.reshape(tokens, heads, own.shape[2] // heads)
    parts = [grad_x.view(tokens, heads, rows)[:, :, : rows - own.shape[2]], own]
    first, h0 = _first_tokens(grad_x, cu_seqlens, reverse), states[0] if states else None
    grad_weight = torch.cat([_grad_weight(d, h.reshape(tokens, heads, size), h0, *first, reverse) for d in parts], 1)
    grad_bias = torch.cat([d.sum(0, dtype=state_dtype(grad_x)) for d in parts], 1)
    return grad_weight.to(weight.dtype), grad_bias.flatten()


def _first_tokens(x: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor | None]:
    """Row among the B * T of the token of each sequence that is read first, and where sequences may be empty, which are
    not."""
    if cu_seqlens is None:
        return torch.arange(x.shape[0], device=x.device) * x.shape[1] + (x.shape[1] - 1) * reverse, None
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    return (stops - 1 if reverse else starts).clamp(0, max(x.shape[1] - 1, 0)), stops > starts


def _grad_weight(d: Tensor, h: Tensor, h0: Tensor | None, first: Tensor, real: Tensor | None, reverse: bool) -> Tensor:
    """sum_t d_t h_{t-1}^T for each head: d (rows, H, m) and h (rows, H, P) to (H, m, P).

    One product over all rows, d shifted by one against h, which pairs the token of a sequence that is read first with
    its neighbour in another one; a small product puts its initial state in that place.
    """
    if d.numel() == 0:
        return h.new_zeros(h.shape[1], d.shape[2], h.shape[2])
    later, earlier, neighbour = (d[:-1], h[1:], first + 1) if reverse else (d[1:], h[:-1], first - 1)
    total = torch.bmm(later.permute(1, 2, 0), earlier.transpose(0, 1))
    dtype = state_dtype(h)
    inside = neighbour.clamp(0, len(h) - 1)
    wrong = (h[inside] * (neighbour == inside)[:, None, None]).to(dtype)
    right = wrong.new_zeros(wrong.shape) if h0 is None else h0.to(dtype).view(wrong.shape)
    start = d[first].to(dtype) if real is None else d[first].to(dtype) * real[:, None, None]
    return total + torch.bmm(start.permute(1, 2, 0), (right - wrong).transpose(0, 1))
