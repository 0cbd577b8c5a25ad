"""The cells as their papers write them: plain torch, any device, any float dtype.

Every other backend is tested against this file in float64. It is also what runs where no compiled backend applies
(no numba, no Triton, float64), so it loops over time with a dozen torch calls a step.

A new cell is two functions, one step forward and one step back, and their entries in CELLS and STEPS_BACK.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

States = tuple[Tensor, ...]


def state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Tensors of one step: pre-activations x and recurrent, the latter R h_{t-1} + b, (N, H, gates, P); states (N, H, P).


def lstm_step(x: Tensor, recurrent: Tensor, states: States) -> States:
    """(h, c) before and after."""
    i, f, g, o = (x + recurrent).unbind(2)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm_step_back(
    x: Tensor, recurrent: Tensor, before: States, after: States, grads: States
) -> tuple[Tensor, Tensor, States]:
    """Gradients of (h, c) after the step to those of x, of `recurrent`, and of (h, c) before it, but for R h_{t-1}."""
    i, f, g, o = (x + recurrent).unbind(2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    tanh_c = after[1].tanh()
    dh, dc = grads
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    dx = torch.stack(
        [dc * g * i * (1 - i), dc * before[1] * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)], 2
    )
    return dx, dx, (torch.zeros_like(dh), dc * f)


def gru_step(x: Tensor, recurrent: Tensor, states: States) -> States:
    """(h,) before and after."""
    r, z = (x + recurrent)[:, :, :2].sigmoid().unbind(2)
    n = (x[:, :, 2] + r * recurrent[:, :, 2]).tanh()
    return (n + z * (states[0] - n),)


def gru_step_back(
    x: Tensor, recurrent: Tensor, before: States, after: States, grads: States
) -> tuple[Tensor, Tensor, States]:
    """As `lstm_step_back`."""
    r, z = (x + recurrent)[:, :, :2].sigmoid().unbind(2)
    n = (x[:, :, 2] + r * recurrent[:, :, 2]).tanh()
    (dh,) = grads
    dn = dh * (1 - z) * (1 - n * n)
    dr, dz = dn * recurrent[:, :, 2] * r * (1 - r), dh * (before[0] - n) * z * (1 - z)
    return torch.stack([dr, dz, dn], 2), torch.stack([dr, dz, dn * r], 2), (dh * z,)


def _slstm_gates(x: Tensor, recurrent: Tensor, states: States) -> tuple[Tensor, ...]:
    """o, tanh(z), f, the shares exp(i - m) that is added and f' that is kept, m, and whether m is i."""
    _, _, n, m = states
    i, f, z, o = (x + recurrent).unbind(2)
    kept = logsigmoid(f) + m
    fresh = (n == 0) | (i > kept)
    m = i.where(fresh, kept)
    return o.sigmoid(), z.tanh(), f, (i - m).exp(), (kept - m).exp().where(n != 0, 0.0), m, fresh


def slstm_step(x: Tensor, recurrent: Tensor, states: States) -> States:
    """(h, c, n, m) before and after."""
    o, z, _, add, keep, m, _ = _slstm_gates(x, recurrent, states)
    c = keep * states[1] + add * z
    n = keep * states[2] + add
    return o * c / n, c, n, m


def slstm_step_back(
    x: Tensor, recurrent: Tensor, before: States, after: States, grads: States
) -> tuple[Tensor, Tensor, States]:
    """As `lstm_step_back`. Of i and log f + m_{t-1}, the one that is m has no exponent of its own: it gets what of the
    gradient of m the other leaves."""
    o, z, f, add, keep, _, fresh = _slstm_gates(x, recurrent, before)
    dh, dc, dn, dm = grads
    mean, by_mean = after[1] / after[2], dh * o / after[2]  # the latter of c_t; of n_t, -mean times it
    dc, dn = dc + by_mean, dn - by_mean * mean
    d_add, d_keep = add * (dc * z + dn), keep * (dc * before[1] + dn * before[2])
    di, d_keep = (dm - d_keep).where(fresh, d_add), d_keep.where(fresh, dm - d_add)
    dx = torch.stack([di, d_keep * (-f).sigmoid(), dc * add * (1 - z * z), dh * mean * o * (1 - o)], 2)
    return dx, dx, (torch.zeros_like(dh), dc * keep, dn * keep, d_keep)


class Cell(NamedTuple):
    gates: int  # pre-activations of a unit
    states: int  # tensors of state, h the first
    step: Callable


CELLS = {"lstm": Cell(4, 2, lstm_step), "gru": Cell(3, 1, gru_step), "slstm": Cell(4, 4, slstm_step)}


class StepBack(NamedTuple):
    step: Callable
    own: int = 0  # how many gates, the last ones, have another gradient in R h + b than in x


# Apart from CELLS: a bundle has the steps alone.
STEPS_BACK = {"lstm": StepBack(lstm_step_back), "gru": StepBack(gru_step_back, 1), "slstm": StepBack(slstm_step_back)}


def _recurrent(
    h: Tensor, weight: Tensor, bias: Tensor | None, gates: int, perturbation: Sequence[Tensor] = ()
) -> Tensor:
    """R h + b: (N, H, P) to (N, H, gates, P); of M members in turn (R + left right^T) h + b."""
    product = torch.bmm(h.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    if perturbation:
        left, right, biases = (p.to(h.dtype) for p in perturbation)
        h = h.unflatten(0, (len(left), -1))
        more = torch.einsum("mnhp,mhpk,mhqk->mnhq", h, right, left)
        product = product + (more + biases.view(len(left), 1, *product.shape[1:])).flatten(0, 1)
    return (product if bias is None else product + bias).unflatten(2, (gates, -1))


def _prepare(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    mask: Tensor | None,
):
    """Everything in the dtype of the state and split into heads."""
    dtype, heads, size = state_dtype(x), weight.shape[0], weight.shape[2]
    x = x.to(dtype).unflatten(2, (heads, CELLS[cell].gates, size))
    zeros = x.new_zeros(x.shape[0], heads, size)
    states = [s.to(dtype).unflatten(1, (heads, size)) for s in states] or [zeros] * CELLS[cell].states
    real = None if mask is None else mask.bool()[:, :, None, None]
    return x, weight.to(dtype), None if bias is None else bias.to(dtype).view(heads, -1), tuple(states), real


def scan(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    training: bool = False,
    perturbation: Sequence[Tensor] = (),
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence one step at a time; arguments and results as in `op.scan`."""
    if cu_seqlens is not None:
        count = len(cu_seqlens) - 1
        pieces = [
            scan(
                cell, x[:, at], weight, bias, [s[n : n + 1] for s in states], m, None, training,
                [p[n * len(p) // count, None] for p in perturbation], reverse,
            )
            for n, at, m in _pieces(mask, cu_seqlens)
        ]  # fmt: skip
        return torch.cat([p[0] for p in pieces], 1), torch.cat([p[1] for p in pieces], 1), torch.cat(
            [p[2] for p in pieces], 1
        )  # fmt: skip
    dtype = x.dtype
    x, weight, bias, state, real = _prepare(cell, x, weight, bias, states, mask)
    every: list[States] = []
    order = _order(x, reverse)
    for t in order:
        recurrent = _recurrent(state[0], weight, bias, CELLS[cell].gates, perturbation)
        new = CELLS[cell].step(x[:, t], recurrent, state)
        state = new if real is None else tuple(a.where(real[:, t], b) for a, b in zip(new, state, strict=True))
        every.append(state)
    every = [every[n] for n in order]  # by place, not by time: either order is its own inverse
    batch, time, size = x.shape[0], x.shape[1], state[0].shape[1] * state[0].shape[2]
    kept = len(state) if training else 1
    all_states = [torch.stack([s[k] for s in every], 1).flatten(2) for k in range(kept if every else 0)]
    h = all_states[0].to(dtype) if every else x.new_empty(batch, 0, size, dtype=dtype)
    others = torch.stack(all_states[1:], 2) if all_states[1:] else x.new_empty(batch, time, kept - 1, size)
    return h, others, torch.stack([s.flatten(1) for s in state])


def decode(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    mask: Tensor | None,
    perturbation: Sequence[Tensor] = (),
) -> Tensor:
    """One token of every row, (B, 1, H * G * P), to h (B, 1, D); the states (B, D) become those after it."""
    dtype = x.dtype
    x, weight, bias, before, real = _prepare(cell, x, weight, bias, states, mask)
    new = CELLS[cell].step(x[:, 0], _recurrent(before[0], weight, bias, CELLS[cell].gates, perturbation), before)
    if real is not None:
        new = tuple(a.where(real[:, 0], b) for a, b in zip(new, before, strict=True))
    for old, state in zip(states, new, strict=True):
        old.copy_(state.flatten(1))
    return new[0].flatten(1)[:, None].to(dtype)


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
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the chain rule, backwards in time; as `op.scan_backward`."""
    if cu_seqlens is not None:
        pieces = [
            scan_backward(
                cell, x[:, at], weight, bias, [s[n : n + 1] for s in states], m, None,
                h[:, at], others[:, at], grad[:, at], grad_last[:, n : n + 1], reverse,
            )
            for n, at, m in _pieces(mask, cu_seqlens)
        ]  # fmt: skip
        along_time, *sums, along_sequences = zip(*pieces, strict=True)
        grad_weight, grad_bias = (torch.stack(s).sum(0) for s in sums)
        return torch.cat(along_time, 1), grad_weight, grad_bias, torch.cat(along_sequences, 1)
    dtype, weight_dtype, heads = x.dtype, weight.dtype, weight.shape[0]
    x, weight, bias, first, real = _prepare(cell, x, weight, bias, states, mask)
    every = [s.to(x.dtype).unflatten(2, (heads, -1)) for s in (h, *others.unbind(2))]
    grad = grad.to(x.dtype).unflatten(2, (heads, -1))
    carry = tuple(grad_last.to(x.dtype).unflatten(2, (heads, -1)))
    grads_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    grad_bias = x.new_zeros(weight.shape[:2])
    order = _order(x, reverse)
    for n in reversed(range(x.shape[1])):
        t = order[n]
        before = tuple(s[:, order[n - 1]] for s in every) if n else first
        after = tuple(s[:, t] for s in every)
        recurrent = _recurrent(before[0], weight, bias, CELLS[cell].gates)
        grads = (carry[0] + grad[:, t], *carry[1:])
        dx, d_recurrent, passed = STEPS_BACK[cell].step(x[:, t], recurrent, before, after, grads)
        if real is not None:
            dx, d_recurrent = (d.where(real[:, t, ..., None], 0.0) for d in (dx, d_recurrent))
            passed = tuple(a.where(real[:, t], b) for a, b in zip(passed, grads, strict=True))
        d_recurrent = d_recurrent.flatten(2).transpose(0, 1)  # (H, N, gates * P)
        carry = (passed[0] + torch.bmm(d_recurrent, weight).transpose(0, 1), *passed[1:])
        grads_x[:, t] = dx
        grad_weight += torch.bmm(d_recurrent.transpose(1, 2), before[0].transpose(0, 1))
        grad_bias += d_recurrent.sum(1)
    grad_states = torch.stack([c.flatten(1) for c in carry])
    return grads_x.flatten(2).to(dtype), grad_weight.to(weight_dtype), grad_bias.flatten(), grad_states


def _order(x: Tensor, reverse: bool) -> range:
    """Of the tokens of x (B, T, ...), as they are read."""
    return range(x.shape[1])[:: -1 if reverse else 1]


def _pieces(mask: Tensor | None, cu_seqlens: Tensor):
    """(n, its slice of time, its mask) of each packed sequence."""
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        yield n, slice(start, stop), None if mask is None else mask[:, start:stop]
