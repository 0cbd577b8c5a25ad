"""What takes the kernels' place in a bundle (see `hf_rnn.hub.bundle`): the same functions, loops over time in torch."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_rnn_kernels.gated_scan import reference as gated
from hf_rnn_kernels.mlstm_scan import reference as mlstm
from hf_rnn_kernels.recurrent_scan import reference as recurrent


def min_gru_scan(
    gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    use_g: bool = True,
) -> tuple[Tensor, Tensor]:
    """z_t = sigmoid(gate_t), h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t): (B, T, D) to all h and the last."""
    return gated.scan("min_gru" + "+g" * use_g, [gate, candidate], h0, mask, cu_seqlens)


def min_lstm_scan(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    use_g: bool = True,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """h_t = f' h_{t-1} + i' g(candidate_t), f' and i' the gates, divided by their sum if `normalize`."""
    gates = "min_lstm" + "+g" * use_g + "+normalize" * normalize
    return gated.scan(gates, [forget, input, candidate], h0, mask, cu_seqlens)


def lstm_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x (B, T, H * 4 * P) and R (H, 4 * P, P), gates i, f, g, o, to all h (B, T, H * P) and the last h and c."""
    return _cell_scan("lstm", x, weight, bias, (h0, c0), mask, cu_seqlens)


def gru_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (B, T, H * 3 * P) and R (H, 3 * P, P), gates r, z, n, to all h (B, T, H * P) and the last."""
    h, last = _cell_scan("gru", x, weight, bias, (h0,), mask, cu_seqlens)
    return h, last[0]


def slstm_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    n0: Tensor | None = None,
    m0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x (B, T, H * 4 * P) and R (H, 4 * P, P), gates i, f, z, o, to all h (B, T, H * P) and the last h, c, n and m."""
    return _cell_scan("slstm", x, weight, bias, (h0, c0, n0, m0), mask, cu_seqlens)


def _cell_scan(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: tuple[Tensor | None, ...],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zeros = x.new_zeros(sequences, weight.shape[0] * weight.shape[2])
    states = [zeros if state is None else state for state in initial]
    h, _, last = recurrent.scan(cell, x, weight, bias, states, mask, cu_seqlens)
    return h, last.unbind(0)


def mlstm_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C0: Tensor | None = None,
    n0: Tensor | None = None,
    m0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """q, k (B, T, H, K), v (B, T, H, V) and gates (B, T, H) to all h (B, T, H, V) and the last C, n and m."""
    states = [state for state in (C0, n0, m0) if state is not None]  # all of them, or none
    if cu_seqlens is not None and not states:
        states = mlstm.initial_states(q, v, cu_seqlens.shape[0] - 1)
    h, _, C, n, m = mlstm.scan(q, k, v, i, f, states, mask, cu_seqlens, eps, False)
    return h, (C, n, m)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def gated_norm(h: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = sigmoid(gate) * weight * norm(h), each head normalised: (..., H, P) to (..., H * P)."""
    return torch.sigmoid(gate) * (torch.nn.functional.layer_norm(h, h.shape[-1:], eps=eps).flatten(-2) * weight)


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) * up, the halves of the last dimension of x."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


class Perturbed(Tensor):
    """The package's weights under zero-order training; here no parameter is one."""


def write_remote_code(config: Any, folder: str | Path) -> None:
    """This file goes with the checkpoint."""
    shutil.copyfile(__file__, Path(folder) / "modeling_hf_rnn.py")
