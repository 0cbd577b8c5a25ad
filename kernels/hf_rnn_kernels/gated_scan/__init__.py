"""Gated linear recurrences: linear_scan, and minGRU and minLSTM fused from pre-activations to states.

Shapes: B batch, T time, D channels, N sequences (B, or len(cu_seqlens) - 1 when packed). All three take
float32, bfloat16 or float16 (recurrence in float32) or float64, give gradients for every floating argument, and run
as numba code on a CPU, as Triton kernels on a GPU, and as plain torch anywhere else.
"""

import torch
from torch import Tensor

from hf_rnn_kernels.checks import check_cu_seqlens, refuse_forward_mode
from hf_rnn_kernels.gated_scan import op, reference


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t, elementwise over channels.

    Args:
        a, b: (B, T, D), same shape, dtype and device.
        h0: initial states (N, D), any sign, any floating dtype; zeros by default.
        cu_seqlens: (N + 1) integers, 0 = c_0 <= c_1 <= ... <= c_N = T: sequence n is rows c_n to c_{n+1} - 1 of a
            batch of one, and starts from h0[n].

    Returns:
        h (B, T, D) in the dtype of `a` and the last states (N, D) in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    return _scan("linear", {"a": a, "b": b}, h0, None, cu_seqlens)


def min_gru_scan(
    gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    use_g: bool = True,
) -> tuple[Tensor, Tensor]:
    """minGRU: z_t = sigmoid(gate_t), h_t = (1 - z_t) h_{t-1} + z_t g(candidate_t).

    "Were RNNs All We Needed?" (arXiv 2410.01201), section 3.1; g(x) = x + 0.5 for x >= 0, else sigmoid(x) (appendix
    B.3). Computed as h + z * (g - h), which keeps its precision when z is small. Nothing but the arguments and h is
    saved for the backward pass.

    Args:
        gate, candidate: pre-activations (B, T, D), same shape, dtype and device. The two halves of one projection
            need no copy.
        h0, cu_seqlens: as in `linear_scan`.
        mask: (B, T), zero or False at padding: such a token leaves the state as it was.
        use_g: False gives the variant whose candidate is linear (section 3.1, before log-space).

    Returns, raises: as `linear_scan`.
    """
    return _scan("min_gru+g" if use_g else "min_gru", {"gate": gate, "candidate": candidate}, h0, mask, cu_seqlens)


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
    """minLSTM: f, i = sigmoid(forget), sigmoid(input); h_t = f' h_{t-1} + i' g(candidate_t).

    "Were RNNs All We Needed?" (arXiv 2410.01201), section 3.2: f' = f / (f + i) and i' = i / (f + i).

    Args:
        forget, input, candidate: pre-activations (B, T, D), same shape, dtype and device.
        h0, mask, cu_seqlens, use_g: as in `min_gru_scan`.
        normalize: False gives f' = f, i' = i, the default of the authors' code; the paper's text normalises.

    Returns, raises: as `linear_scan`.
    """
    gates = "min_lstm" + "+g" * use_g + "+normalize" * normalize
    return _scan(gates, {"forget": forget, "input": input, "candidate": candidate}, h0, mask, cu_seqlens)


def _scan(
    gates: str, inputs: dict[str, Tensor], h0: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(inputs, h0, mask, cu_seqlens)
    tensors = list(inputs.values())
    refuse_forward_mode(*tensors, h0)
    mask = None if mask is None else mask.bool()
    if tensors[0].shape[1] == 1 and cu_seqlens is None and not torch.compiler.is_exporting():
        return reference.scan(gates, tensors, h0, mask)  # one step of decoding: a few elementwise calls, no scan
    return op.scan(gates, tensors, h0, mask, cu_seqlens)


def _check(inputs: dict[str, Tensor], h0: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    (first_name, first), *others = inputs.items()
    if first.dim() != 3:
        raise ValueError(f"{first_name}: expected shape (B, T, D), got {tuple(first.shape)}")
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{first_name}: expected float32, bfloat16, float16 or float64, got {first.dtype}")
    for name, x in others:
        if x.shape != first.shape:
            raise ValueError(f"{name}: expected the shape of {first_name}, {tuple(first.shape)}, got {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {first_name}, {first.dtype}, got {x.dtype}")
    for name, other in [*others, ("h0", h0), ("mask", mask), ("cu_seqlens", cu_seqlens)]:
        if other is not None and other.device != first.device:
            raise ValueError(f"{name}: expected on the device of {first_name}, {first.device}, got {other.device}")
    batch, time, channels = first.shape
    sequences = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, time)
        sequences = cu_seqlens.shape[0] - 1
    if h0 is not None and h0.shape != (sequences, channels):
        raise ValueError(f"h0: expected shape (N, D) = {(sequences, channels)}, got {tuple(h0.shape)}")
    if h0 is not None and not h0.is_floating_point():
        raise TypeError(f"h0: expected a floating dtype, got {h0.dtype}")
    if mask is not None and mask.shape != (batch, time):
        raise ValueError(f"mask: expected shape (B, T) = {(batch, time)}, got {tuple(mask.shape)}")
