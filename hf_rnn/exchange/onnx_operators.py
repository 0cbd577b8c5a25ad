"""The package's operators in what ONNX has: LSTM and GRU as they are, the others a `Scan` over time.

Each takes and gives what the operator of its name does, of rows, in float32, where a program is made of it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_rnn.exchange.gate_order import ONNX_GATES
from hf_rnn.layers.sliding_attention import rows
from hf_rnn_kernels.gated_scan.reference import coefficients
from hf_rnn_kernels.mlstm_scan.reference import initial_states
from hf_rnn_kernels.recurrent_scan.reference import slstm_step

CHUNK = 64  # tokens of an mLSTM that are multiplied at once: longer ones cost more than they save


def over_time(
    step: Callable[..., tuple[Tensor, ...]],
    states: Sequence[Tensor],
    inputs: Sequence[Tensor],
    constants: tuple[Tensor, ...] = (),
    reverse: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """A `Scan`: `step(*states, *inputs, *constants)` to the next states and an output, for each token of the inputs
    (T, B, ...); to the last states and the outputs (T, B, ...).

    As torch's operator itself: the function around it compiles the step, and then takes sizes for inputs of the step.
    """
    if reverse:
        inputs = [x.flip(0) for x in inputs]

    def checked(*arguments):  # states must stay as they lie, and an output be no state
        *new, y = step(*arguments)
        return [*(x.contiguous() for x in new), y.clone()]

    *last, y = torch.ops.higher_order.scan(checked, [x.contiguous() for x in states], list(inputs), constants)
    return last, y.flip(0) if reverse else y


def time_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(0, 1) for x in tensors)


def gated_scan(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """h + (add - drop * h), exact for slow gates."""
    _, drop, add = coefficients(gates, inputs)
    if mask is not None:
        drop, add = (x.where(mask[..., None], 0.0) for x in (drop, add))

    def step(h, drop, add):
        h = h + (add - drop * h)
        return h, h

    h0 = drop.new_zeros(drop.shape[0], drop.shape[2]) if h0 is None else h0
    (last,), h = over_time(step, [h0], time_first(drop, add), reverse=reverse)
    return h.transpose(0, 1), last


def recurrent_scan(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    training: bool,
    perturbation: list[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """An input that is projected already goes through ONNX's own projection as it is: a head's identity."""
    others = x.new_empty(*x.shape[:2], 0, weight.shape[0] * weight.shape[2])
    if cell == "slstm":
        h, last = _slstm(x, weight, bias, states, mask, reverse)
    else:
        identity = torch.eye(x.shape[2], dtype=x.dtype)
        h, last = recurrent_layer(cell, x, identity, None, weight, bias, states, mask, training, reverse)
    return h, others, last


def recurrent_layer(
    cell: str,
    x: Tensor,
    input_weight: Tensor,
    input_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    training: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """A head is an LSTM or a GRU of its own. ONNX's know padding at the end alone: real tokens are moved to the front,
    and what is read at padding is what was there before it."""
    heads, height, size = weight.shape
    zeros = x.new_zeros(heads * height)
    biases = [zeros if b is None else b for b in (input_bias, bias)]
    states = states or [x.new_zeros(x.shape[0], heads * size)] * (2 if cell == "lstm" else 1)
    lengths = place = None
    if mask is not None:
        place = (mask.long().cumsum(1) - 1).clamp(min=0)
        order = torch.zeros_like(place).scatter_add(1, place, torch.arange(mask.shape[1]) * mask)
        x, lengths = rows(x, order), mask.sum(1, dtype=torch.int32)
    outputs = []
    for head in range(heads):
        own, unit = slice(head * height, (head + 1) * height), slice(head * size, (head + 1) * size)
        weights = [input_weight[own], weight[head]]
        of_head = [b[own] for b in biases], [s[:, unit] for s in states]
        outputs.append(_onnx_layer(cell, x.transpose(0, 1), weights, *of_head, lengths, reverse))
    h, *last = (torch.cat(parts, -1) for parts in zip(*outputs, strict=True))
    h, after = h.transpose(0, 1), torch.stack(last)
    if place is not None and lengths is not None:
        h, after = rows(h, place), torch.where((lengths > 0)[:, None], after, torch.stack(states))
    return h, after


def _onnx_layer(
    cell: str,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    states: list[Tensor],
    lengths: Tensor | None,
    reverse: bool,
) -> list[Tensor]:
    """ONNX's LSTM or GRU of one head: x (T, B, I), weights (G * P, I) and (G * P, P), states (B, P) to h (T, B, P) and
    the last states."""
    time, batch, size = *x.shape[:2], weights[1].shape[1]
    order = torch.cat(
        [torch.arange(gate * size, (gate + 1) * size) for gate in ONNX_GATES[weights[1].shape[0] // size]]
    )
    inputs = [x, *(w[order][None] for w in weights), torch.cat([b[order] for b in biases])[None]]
    inputs += [lengths, *(s[None] for s in states)]  # type: ignore[list-item]
    attributes: dict[str, Any] = dict(hidden_size=size, direction="reverse" if reverse else "forward")
    if cell == "gru":
        attributes["linear_before_reset"] = 1
    shapes = [(time, 1, batch, size), *[(1, batch, size)] * len(states)]
    h, *last = torch.onnx.ops.symbolic_multi_out(
        cell.upper(), inputs, attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
    )
    return [h[:, 0], *(s[0] for s in last)]


def _slstm(
    x: Tensor, weight: Tensor, bias: Tensor | None, states: list[Tensor], mask: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    heads, _, size = weight.shape
    x = x.unflatten(2, (heads, 4, size))
    states = states or [x.new_zeros(x.shape[0], heads * size) for _ in range(4)]
    offset = weight.new_zeros(heads, 1, 4 * size) if bias is None else bias.view(heads, 1, 4 * size)

    def step(h, c, n, m, x, real, matrix, offset):
        recurrent = torch.bmm(h.transpose(0, 1), matrix) + offset  # (H, B, 4 * P)
        new = slstm_step(x, recurrent.transpose(0, 1).unflatten(2, (4, size)), (h, c, n, m))
        if mask is not None:
            new = tuple(a.where(real[:, None, None], b) for a, b in zip(new, (h, c, n, m), strict=True))
        return *new, new[0]

    before = [s.unflatten(1, (heads, size)) for s in states]
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    last, h = over_time(step, before, time_first(x, real), (weight.mT, offset), reverse)
    return h.transpose(0, 1).flatten(2), torch.stack([s.flatten(1) for s in last])


def mlstm_scan(
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
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Chunk by chunk, within a chunk by products of matrices; a single token is a chunk of one."""
    batch, time, heads, keys = q.shape
    states = states or initial_states(q, v, batch)
    norms = i.new_empty(batch, time, heads, 0)
    f = F.logsigmoid(f)
    if mask is not None:  # nothing forgotten, nothing added
        i, f = i.where(mask[..., None], -torch.inf), f.where(mask[..., None], 0.0)
        q, k, v = (x.where(mask[..., None, None], 0.0) for x in (q, k, v))
    if reverse:
        q, k, v, i, f = (x.flip(1) for x in (q, k, v, i, f))
    # Of so many tokens; ONNX would fail on none
    chunk = torch.sym_max(torch.sym_min(time, CHUNK), 1)
    count = (time + chunk - 1) // chunk
    rest = count * chunk - time
    q, k, v, f = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, rest)) for x in (q, k, v, f))
    i = F.pad(i, (0, 0, 0, rest), value=-torch.inf)
    # (B, N * L, H, ...) to (N, B, H, L, ...)
    chunks = (x.unflatten(1, (count, chunk)).movedim(1, 0).transpose(2, 3) for x in (q * keys**-0.5, k, v, i, f))
    place = torch.arange(chunk)
    last, h = over_time(partial(_mlstm_chunk, eps), states, tuple(chunks), (place[:, None] >= place,))
    h = h.transpose(2, 3).movedim(0, 1).flatten(1, 2)[:, :time]
    C, n, m = last
    return h.flip(1) if reverse else h, norms, C, n, m


def _mlstm_chunk(
    eps: float,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    seen: Tensor,
) -> tuple[Tensor, ...]:
    """C (B, H, K, V), n (B, H, K), m (B, H) and q / sqrt(K), k (B, H, L, K), v (B, H, L, V), i, log f (B, H, L) to the
    states after the chunk and h (B, H, L, V). `seen` (L, L): of which tokens a token is told."""
    f = f.cumsum(2)
    # (B, H, L, L): how much of token s is there at token t, and (B, H, L) how much of the state
    within = (f[..., None] - f[..., None, :] + i[..., None, :]).where(seen, -torch.inf)
    before = f + m[..., None]
    top = torch.maximum(within.amax(3), before)
    share, kept = (within - top[..., None]).exp(), (before - top).exp()[..., None]
    scores = share * (q @ k.mT)
    normalizer = scores.sum(3) + ((kept * q) @ n[..., None]).squeeze(3)
    h = (scores @ v + (kept * q) @ C) / (torch.maximum(normalizer.abs(), (-top).exp()) + eps)[..., None]
    added, kept = share[..., -1, :, None] * k, kept[:, :, -1]
    return kept[..., None] * C + added.mT @ v, kept * n + added.sum(2), top[..., -1], h


def argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    """torch's stable one: ONNX's `TopK` gives the first of equals first."""
    return torch.topk(x, x.shape[dim], dim=dim, largest=descending)[1]


TABLE = {
    torch.ops.hf_rnn.gated_scan.default: gated_scan,
    torch.ops.hf_rnn.mlstm_scan.default: mlstm_scan,
    torch.ops.hf_rnn.recurrent_layer.default: recurrent_layer,
    torch.ops.hf_rnn.recurrent_scan.default: recurrent_scan,
    torch.ops.aten.argsort.stable: argsort,
}
