"""The mLSTM as its paper writes it: plain torch, any device, any float dtype.

Every other backend is tested against this file in float64. It is also what runs where no compiled backend applies
(no numba, no Triton, float64), so it loops over time.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

States = tuple[Tensor, Tensor, Tensor]  # C (N, H, K, V), n (N, H, K), m (N, H)
Token = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k (N, H, K), v (N, H, V), i and log sigmoid(f) (N, H)


def state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def initial_states(q: Tensor, v: Tensor, sequences: int) -> list[Tensor]:
    """C (N, H, K, V), n (N, H, K) and m (N, H), all zero."""
    heads, dtype = q.shape[2], state_dtype(q)
    shapes = [(q.shape[3], v.shape[3]), (q.shape[3],), ()]
    return [q.new_zeros(sequences, heads, *shape, dtype=dtype) for shape in shapes]


def step(token: Token, states: States, eps: float) -> tuple[Tensor, Tensor, States]:
    """One token to h (N, H, V), the normaliser n q (N, H), and the new states."""
    q, k, v, i, f = token
    C, n, m_before = states
    m = torch.maximum(f + m_before, i)
    forget, add = (f + m_before - m).exp(), (i - m).exp()
    C = forget[..., None, None] * C + _outer(k, add[..., None] * v)
    n = forget[..., None] * n + add[..., None] * k
    q = q * q.shape[-1] ** -0.5
    normalizer = (q * n).sum(-1)
    h = (q[..., None, :] @ C).squeeze(-2) / (torch.maximum(normalizer.abs(), (-m).exp()) + eps)[..., None]
    return h, normalizer, (C, n, m)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    real: Tensor | None,
    eps: float,
) -> Tensor:
    """One token over the states; as `op.decode`."""
    queries, keys, values, forget, denominator = prepare_step(q, k, v, i, f, n, m, real, eps)
    C.mul_(forget[..., None]).addcmul_(keys[..., None], values[..., None, :])
    return finish_step(torch.matmul(queries[..., None, :], C).squeeze(-2), denominator, real, q.dtype)


def prepare_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, n: Tensor, m: Tensor, real: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All of a decoding step but C: n and m become those after it; q / sqrt(K), i' k, v, f' (B, H, 1) and what the
    numerator C^T q is divided by (B, H). In few calls: they are what decoding costs on a CPU."""
    q, k, v, i, f = (x.to(n.dtype) for x in (q, k, v, i, f))
    kept = torch.nn.functional.logsigmoid(f) + m
    if real is not None:  # at padding nothing is forgotten and nothing added, whatever it holds
        i, kept = i.where(real[:, None], -torch.inf), kept.where(real[:, None], m)
        q, k, v = (x.where(real[:, None, None], 0.0) for x in (q, k, v))
    top = torch.maximum(kept, i)
    forget, add = (kept - top).exp_()[..., None], (i - top).exp_()[..., None]
    k, q = add * k, q * q.shape[-1] ** -0.5
    torch.addcmul(k, forget, n, out=n)
    m.copy_(top)
    return q, k, v, forget, torch.maximum((q * n).sum(-1).abs_(), (-top).exp_()).add_(eps)


def finish_step(numerator: Tensor, denominator: Tensor, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    h = numerator / denominator[..., None]
    return h.to(dtype) if real is None else h.where(real[:, None, None], 0.0).to(dtype)


def step_back(
    token: Token, before: States, eps: float, grad: Tensor, grads: States
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, States]:
    """Gradients of h and of the states after a step to those of q, k, v, i, f and the states before it."""
    q, k, v, i, f = token
    h, normalizer, (C, n, m) = step(token, before, eps)
    forget, add = (f + before[2] - m).exp(), (i - m).exp()
    floor, scale = (-m).exp(), q.shape[-1] ** -0.5
    denominator = torch.maximum(normalizer.abs(), floor) + eps
    d_numerator, d_denominator = grad / denominator[..., None], -(grad * h).sum(-1) / denominator
    above = normalizer.abs() > floor
    d_normalizer = torch.where(above, normalizer.sign() * d_denominator, 0.0)[..., None]
    dq = scale * ((C @ d_numerator[..., None]).squeeze(-1) + d_normalizer * n)
    dC = grads[0] + _outer(scale * q, d_numerator)
    dn = grads[1] + d_normalizer * scale * q
    dk = add[..., None] * ((dC @ v[..., None]).squeeze(-1) + dn)
    dv = add[..., None] * (k[..., None, :] @ dC).squeeze(-2)
    d_forget = forget * ((dC * before[0]).sum((-1, -2)) + (dn * before[1]).sum(-1))
    d_add = (k * dk).sum(-1)
    dm = grads[2] - torch.where(above, 0.0, floor * d_denominator) - d_forget - d_add
    kept = f + before[2] > i
    d_forget, d_add = d_forget + dm.where(kept, 0.0), d_add + dm.where(~kept, 0.0)
    return dq, dk, dv, d_add, d_forget, (forget[..., None, None] * dC, forget[..., None] * dn, d_forget)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., None] * b[..., None, :]


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, states: list[Tensor], mask: Tensor | None, order: slice
):
    """In the states' dtype, padding made harmless, the forget gate as a logarithm; token by token in this order."""
    first = [s.to(state_dtype(q), copy=True) for s in states] or initial_states(q, v, q.shape[0])
    q, k, v, i, f = (x.to(state_dtype(q)) for x in (q, k, v, i, f))
    f = torch.nn.functional.logsigmoid(f)
    if mask is not None:
        real = mask.bool()[..., None]
        q, k, v = (x.where(real[..., None], 0.0) for x in (q, k, v))
        i, f = i.where(real, -torch.inf), f.where(real, 0.0)
    return zip(*(x.unbind(1)[order] for x in (q, k, v, i, f)), strict=True), (first[0], first[1], first[2])


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    training: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence one step at a time; arguments and results as in `op.scan`."""
    if cu_seqlens is not None:
        pieces = [
            scan(
                q[:, at], k[:, at], v[:, at], i[:, at], f[:, at], [s[n : n + 1] for s in states], m, None, eps,
                training, reverse,
            )
            for n, at, m in _pieces(mask, cu_seqlens)
        ]  # fmt: skip
        return _joined(pieces, 2)  # type: ignore[return-value]
    order = _order(reverse)
    tokens, state = _prepare(q, k, v, i, f, states, mask, order)
    hs, norms = [], []
    for token in tokens:
        h, normalizer, state = step(token, state, eps)
        hs.append(h)
        norms.append(torch.stack([normalizer, state[2]], -1))
    all_h = torch.stack(hs[order], 1).to(q.dtype) if hs else torch.empty_like(v)
    all_norms = torch.stack(norms[order], 1) if training and hs else state[2].new_empty(*i.shape, 2 * training)
    return all_h, all_norms, *state


def scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    h: Tensor,
    norms: Tensor,
    grad: Tensor,
    grad_last: list[Tensor],
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the chain rule, backwards in time; as `op.scan_backward`."""
    if cu_seqlens is not None:
        pieces = [
            scan_backward(
                q[:, at], k[:, at], v[:, at], i[:, at], f[:, at], [s[n : n + 1] for s in states], m, None, eps,
                h[:, at], norms[:, at], grad[:, at], [g[n : n + 1] for g in grad_last], reverse,
            )
            for n, at, m in _pieces(mask, cu_seqlens)
        ]  # fmt: skip
        return _joined(pieces, 5)  # type: ignore[return-value]
    order = _order(reverse)
    tokens, state = _prepare(q, k, v, i, f, states, mask, order)
    every, carry = [], tuple(g.to(s.dtype, copy=True) for g, s in zip(grad_last, state, strict=False))
    carry = carry or tuple(torch.zeros_like(s) for s in state)
    assert len(carry) == 3
    for token in tokens:
        every.append((token, state))
        state = step(token, state, eps)[2]
    real = torch.ones_like(i).bool() if mask is None else mask.bool()[..., None].expand_as(i)
    grads = [x.new_zeros(x.shape, dtype=state[0].dtype) for x in (q, k, v, i, f)]
    for t, (token, before) in reversed(list(zip(range(i.shape[1])[order], every, strict=True))):
        dh = grad[:, t].to(state[0].dtype).where(real[:, t, :, None], 0.0)
        *of_token, carry = step_back(token, before, eps, dh, carry)
        for x, dx in zip(grads, of_token, strict=True):
            x[:, t] = dx
    grads[4] = grads[4] * torch.sigmoid(-f.to(grads[4].dtype)).where(real, 0.0)
    return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v, i, f), strict=True)), *carry  # type: ignore[return-value]


def _order(reverse: bool) -> slice:
    """Of time, as it is read; and of what was read, as it lies."""
    return slice(None, None, -1 if reverse else 1)


def _pieces(mask: Tensor | None, cu_seqlens: Tensor):
    """(n, its slice of time, its mask) of each packed sequence."""
    for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        yield n, slice(start, stop), None if mask is None else mask[:, start:stop]


def _joined(pieces: Sequence[tuple[Tensor, ...]], along_time: int) -> tuple[Tensor, ...]:
    """Results of packed sequences, the first `along_time` of them with a time dimension."""
    columns = list(zip(*pieces, strict=True))
    return *(torch.cat(c, 1) for c in columns[:along_time]), *(torch.cat(c) for c in columns[along_time:])
