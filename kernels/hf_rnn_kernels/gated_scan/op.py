"""`hf_rnn::gated_scan`.

`gates` names the recurrence: "linear", "min_gru" or "min_lstm", followed by its options, "+g" (candidate through g) and
"+normalize" (f and i divided by their sum).
"""

import torch
from torch import Tensor

from hf_rnn_kernels.checks import check_inputs
from hf_rnn_kernels.gated_scan.reference import state_dtype
from hf_rnn_kernels.layout import check_packing
from hf_rnn_kernels.operators import backend, operator


def _backward_shapes(gates, inputs, h0, mask, cu_seqlens, h, grad, grad_last, reverse):
    batch, time, channels = h.shape
    return h.new_empty(batch, time, len(inputs), channels), torch.empty_like(grad_last)


@operator("gated_scan_backward", fake=_backward_shapes)
def scan_backward(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    grad: Tensor,
    grad_last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs, side by side as (B, T, len(inputs), D), and of the initial states (N, D), from those of
    h and of the last states."""
    chosen = backend(__package__, inputs[0])
    return chosen.scan_backward(gates, inputs, h0, mask, cu_seqlens, h, grad, grad_last, reverse)


def _save(ctx, inputs, output) -> None:
    gates, tensors, h0, mask, cu_seqlens, reverse = inputs
    ctx.gates, ctx.has_h0, ctx.reverse = gates, h0 is not None, reverse
    ctx.save_for_backward(h0, mask, cu_seqlens, output[0], *tensors)


def _backward(ctx, grad, grad_last):
    h0, mask, cu_seqlens, h, *inputs = ctx.saved_tensors
    grads, grad_h0 = scan_backward(ctx.gates, inputs, h0, mask, cu_seqlens, h, grad, grad_last, ctx.reverse)
    return None, list(grads.unbind(2)), grad_h0.to(h0.dtype) if ctx.has_h0 else None, None, None, None


def _shapes(gates, inputs, h0, mask, cu_seqlens, reverse):
    sequences = inputs[0].shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = torch.empty(inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device)
    return h, h.new_empty(sequences, h.shape[2], dtype=state_dtype(h))


@operator("gated_scan", fake=_shapes, backward=_backward, save=_save)
def scan(
    gates: str,
    inputs: list[Tensor],
    h0: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        gates: the recurrence and its options.
        inputs: two or three (B, T, D) tensors of one floating dtype; their last dimension is best contiguous.
        h0: initial states (N, D), zeros if None. N is B, or the number of packed sequences.
        mask: (B, T), zero where a token is padding: its state is its predecessor's.
        cu_seqlens: (N + 1) int offsets of the sequences packed in a batch of one.
        reverse: each sequence from its last token to its first.

    Returns:
        h (B, T, D) in the inputs' dtype and the last states (N, D) in float32 (float64 for float64 inputs).
    """
    if inputs[0].device.type == "cpu":  # again, for callers that could not know or did not ask: the loops trust it
        sequences = check_inputs({f"inputs[{i}]": x for i, x in enumerate(inputs)}, mask, cu_seqlens)
        check_packing(cu_seqlens, inputs[0])
        channels = inputs[0].shape[2]
        if h0 is not None and h0.shape != (sequences, channels):
            raise ValueError(f"h0: expected shape (N, D) = {(sequences, channels)}, got {tuple(h0.shape)}")
    return backend(__package__, inputs[0]).scan(gates, inputs, h0, mask, cu_seqlens, reverse)
