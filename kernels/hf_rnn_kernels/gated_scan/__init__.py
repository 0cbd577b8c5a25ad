"""Gated linear recurrences: linear_scan, and minGRU and minLSTM fused from pre-activations to states.

Shapes: B batch, T time, D channels, N sequences (B, or len(cu_seqlens) - 1 when packed). All three take
float32, bfloat16 or float16 (recurrence in float32) or float64, give gradients for every floating argument, and run
as numba code on a CPU, as Triton kernels on a GPU, and as plain torch anywhere else.
"""

import torch
from torch import Tensor

from hf_rnn_kernels.checks import check_scan, refuse_forward_mode
from hf_rnn_kernels.gated_scan import op, reference
from hf_rnn_kernels.transforms import tracked


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
    sequences = check_scan(inputs, mask, cu_seqlens)
    first_name, first = next(iter(inputs.items()))
    if h0 is not None and h0.device != first.device:
        raise ValueError(f"h0: expected on the device of {first_name}, {first.device}, got {h0.device}")
    if h0 is not None and h0.shape != (sequences, first.shape[2]):
        raise ValueError(f"h0: expected shape (N, D) = {(sequences, first.shape[2])}, got {tuple(h0.shape)}")
    if h0 is not None and not h0.is_floating_point():
        raise TypeError(f"h0: expected a floating dtype, got {h0.dtype}")
    tensors = list(inputs.values())
    refuse_forward_mode(*tensors, h0)
    mask = None if mask is None else mask.bool()
    if first.shape[1] == 1 and cu_seqlens is None and not tracked(*tensors, h0) and not torch.compiler.is_exporting():
        return reference.step(gates, tensors, h0, mask)  # one step of decoding: a few elementwise calls, no scan
    return op.scan(gates, tensors, h0, mask, cu_seqlens)
