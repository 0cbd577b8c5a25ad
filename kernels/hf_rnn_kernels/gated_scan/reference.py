"""The recurrences as the papers write them: plain torch, any device, any float dtype.

Every other backend is tested against this file in float64. It is also what runs where no compiled backend applies
(no numba, no Triton, float64), so it loops over time with a handful of torch calls a step.
"""

import torch
from torch import Tensor


def g(x: Tensor) -> Tensor:
    """g(x) = x + 0.5 for x >= 0, sigmoid(x) otherwise: keeps the candidate positive ("Were RNNs All We Needed?", B.3)."""
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
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one step at a time; arguments and results as in `hf_rnn_kernels.gated_scan.op.scan`."""
    if cu_seqlens is not None:
        return _scan_packed(gates, inputs, h0, mask, cu_seqlens)
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    keep, drop, add = coefficients(gates, [x.to(dtype) for x in inputs])
    if mask is not None:
        keep, drop, add = keep.where(mask[..., None], 1.0), drop * mask[..., None], add * mask[..., None]
    h = inputs[0].new_zeros(inputs[0].shape[0], inputs[0].shape[2], dtype=dtype) if h0 is None else h0.to(dtype)
    states = []
    for keep_t, drop_t, add_t in zip(keep.unbind(1), drop.unbind(1), add.unbind(1), strict=True):
        h = keep_t * h + add_t if gates == "linear" else torch.where(
            drop_t < 0.5, h + (add_t - drop_t * h), keep_t * h + add_t
        )
        states.append(h)
    return torch.stack(states, 1).to(inputs[0].dtype), h


def _scan_packed(
    gates: str, inputs: list[Tensor], h0: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    bounds = cu_seqlens.tolist()
    states, last = [], []
    for n, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state = None if h0 is None else h0[n : n + 1]
        if start == stop:  # an empty sequence hands its initial state on
            last.append(inputs[0].new_zeros(1, inputs[0].shape[2], dtype=torch.float32) if state is None else state)
            continue
        h, h_last = scan(gates, [x[:, start:stop] for x in inputs], state, None if mask is None else mask[:, start:stop])
        states.append(h)
        last.append(h_last)
    return torch.cat(states, 1), torch.cat(last, 0)
