"""The recurrences as the papers write them: plain torch, any device, any float dtype.

Every other backend is tested against this file in float64. It is also what runs where no compiled backend applies
(no numba, no Triton, float64), so it loops over time with a handful of torch calls a step.
"""

from itertools import pairwise

import torch
from torch import Tensor


def state_dtype(x: Tensor) -> torch.dtype:
    """Of the recurrence: float32, or float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def g(x: Tensor) -> Tensor:
    """g(x) = x + 0.5 for x >= 0, sigmoid(x) otherwise: keeps the candidate positive (2410.01201, B.3)."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def coefficients(gates: str, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations to (keep, drop, add): h_t = keep_t * h_{t-1} + add_t, with drop = 1 - keep free of cancellation.

    `drop` is what makes slow gates exact: at keep = 0.9997 the rounding of `keep` alone is a relative error of 1e-4
    in 1 - keep, while sigmoid gives `drop` to the last bit.
    """
    name, *options = gates.split("+")
    if name == "linear":
        a, b = inputs
        return a, 1 - a, b
    candidate = g(inputs[-1]) if "g" in options else inputs[-1]
    if name == "min_gru":
        gate = inputs[0]
        return torch.sigmoid(-gate), torch.sigmoid(gate), torch.sigmoid(gate) * candidate
    forget, input_ = inputs[:2]
    if "normalize" in options:  # f / (f + i) and i / (f + i), through logarithms because f + i underflows
        log_ratio = torch.nn.functional.logsigmoid(input_) - torch.nn.functional.logsigmoid(forget)
        return torch.sigmoid(-log_ratio), torch.sigmoid(log_ratio), torch.sigmoid(log_ratio) * candidate
    return torch.sigmoid(forget), torch.sigmoid(-forget), torch.sigmoid(input_) * candidate


def scan(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one step at a time; arguments and results as in `hf_rnn_kernels.gated_scan.op.scan`."""
    if cu_seqlens is not None:
        pieces = [scan(gates, *arguments, reverse=reverse) for arguments in _pieces(inputs, h0, mask, cu_seqlens)]
        return torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces], 0)
    if reverse:
        h, last = scan(gates, [x.flip(1) for x in inputs], h0, None if mask is None else mask.flip(1))
        return h.flip(1), last
    dtype = state_dtype(inputs[0])
    keep, drop, add = coefficients(gates, [x.to(dtype) for x in inputs])
    if mask is not None:
        real = mask[..., None].bool()
        keep, drop, add = keep.where(real, 1.0), drop.where(real, 0.0), add.where(real, 0.0)
    batch, _, channels = inputs[0].shape
    h = keep.new_zeros(batch, channels) if h0 is None else h0.to(dtype).clone()
    states = []
    for keep_t, drop_t, add_t in zip(keep.unbind(1), drop.unbind(1), add.unbind(1), strict=True):
        h = (
            keep_t * h + add_t
            if gates == "linear"
            else torch.where(drop_t < 0.5, h + (add_t - drop_t * h), keep_t * h + add_t)
        )
        states.append(h)
    return (torch.stack(states, 1) if states else torch.empty_like(inputs[0])).to(inputs[0].dtype), h


def decode(gates: str, inputs: list[Tensor], h0: Tensor, mask: Tensor | None) -> Tensor:
    """One token of every row, (B, 1, D), from the state h0 (B, D) before it, which becomes the one after it.

    As `scan` in fewer calls: what decoding costs on a CPU is calls. Where keep and drop are a gate and its complement,
    h + share * (goal - h), which `lerp` turns round for shares over a half, so that fast and slow gates lose nothing.
    """
    dtype = state_dtype(inputs[0])
    values = inputs if inputs[0].dtype == dtype else [x.to(dtype) for x in inputs]
    h = h0.to(dtype)[:, None]
    name, *options = gates.split("+")
    if name == "min_gru" or "normalize" in options:
        if name == "min_gru":
            share = values[0].sigmoid()
        else:
            share = torch.nn.functional.logsigmoid(values[1]).sub_(torch.nn.functional.logsigmoid(values[0])).sigmoid_()
        goal = values[-1]
        if "g" in options:  # x + 0.5 where x >= 0, else sigmoid(x)
            goal = goal.clamp(max=0).sigmoid_().add_(goal.relu())
        new = torch.lerp(h, goal, share)
    else:
        keep, drop, add = coefficients(gates, values)
        new = keep * h + add
        if name != "linear":
            new = torch.where(drop < 0.5, h + (add - drop * h), new)
    if mask is not None:
        new = new.where(mask[..., None], h)
    h0.copy_(new[:, 0])
    return new.to(inputs[0].dtype)


def scan_backward(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    grad: Tensor,
    grad_last: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients by the chain rule, backwards in time; as `hf_rnn_kernels.gated_scan.op.scan_backward`."""
    if cu_seqlens is not None:
        pieces = [
            scan_backward(gates, *arguments, grad_last[n : n + 1], reverse=reverse)  # type: ignore[call-arg]
            for n, arguments in enumerate(_pieces(inputs, h0, mask, cu_seqlens, h, grad))
        ]
        return torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces], 0)
    if reverse:
        inputs, mask = [x.flip(1) for x in inputs], None if mask is None else mask.flip(1)
        turned, grad_h0 = scan_backward(gates, inputs, h0, mask, None, h.flip(1), grad.flip(1), grad_last)
        return turned.flip(1), grad_h0
    dtype = state_dtype(inputs[0])
    tensors = [x.to(dtype) for x in inputs]
    keep, drop, _ = coefficients(gates, tensors)
    real = torch.ones_like(keep, dtype=torch.bool) if mask is None else mask[..., None].bool().expand_as(keep)
    state = torch.zeros_like(grad_last) if h0 is None else h0.to(dtype)
    before = torch.cat([state[:, None], h.to(dtype)], 1)[:, :-1]
    carry, dh = grad_last.to(dtype, copy=True), torch.empty_like(keep)
    for t in reversed(range(keep.shape[1])):
        dh[:, t] = grad[:, t] + carry
        kept = (
            dh[:, t] * keep[:, t]
            if gates == "linear"
            else torch.where(drop[:, t] < 0.5, dh[:, t] - drop[:, t] * dh[:, t], keep[:, t] * dh[:, t])
        )
        carry = torch.where(real[:, t], kept, dh[:, t])
    grads = [(x * dh).where(real, 0.0) for x in _partial_derivatives(gates, tensors, before)]
    return torch.stack(grads, 2).to(inputs[0].dtype), carry


def _partial_derivatives(gates: str, inputs: list[Tensor], before: Tensor) -> list[Tensor]:
    """dh_t / d input_t for each input, h_{t-1} held fixed."""
    name, *options = gates.split("+")
    if name == "linear":
        return [before, torch.ones_like(before)]
    x = inputs[-1]
    candidate = g(x) if "g" in options else x
    slope = torch.where(x >= 0, 1.0, x.sigmoid() * (-x).sigmoid()) if "g" in options else torch.ones_like(x)
    keep, drop, _ = coefficients(gates, inputs)
    if name == "min_gru":
        return [2 * drop * keep * (0.5 * candidate - 0.5 * before), drop * slope]  # halves cannot overflow
    forget, input_ = inputs[:2]
    if "normalize" in options:
        ratio = 2 * drop * keep * (0.5 * candidate - 0.5 * before)
        return [-ratio * torch.sigmoid(-forget), ratio * torch.sigmoid(-input_), drop * slope]
    i = input_.sigmoid()
    return [keep * drop * before, i * torch.sigmoid(-input_) * candidate, i * slope]


def _pieces(inputs: list[Tensor], h0: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor, *others: Tensor):
    """(inputs, h0, mask, None, *others) of each packed sequence, None standing for its cu_seqlens."""
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        yield (
            [x[:, start:stop] for x in inputs],
            None if h0 is None else h0[n : n + 1],
            None if mask is None else mask[:, start:stop],
            None,
            *(x[:, start:stop] for x in others),
        )
