"""`hf_rnn::recurrent_scan`."""

import torch
from torch import Tensor

from hf_rnn_kernels.checks import check_inputs
from hf_rnn_kernels.layout import check_packing
from hf_rnn_kernels.operators import backend, operator
from hf_rnn_kernels.recurrent_scan.reference import CELLS, state_dtype


def _backward_shapes(cell, x, weight, bias, states, mask, cu_seqlens, h, others, grad, grad_last, reverse):
    grad_bias = grad_last.new_empty(weight.shape[0] * weight.shape[1])
    return x.new_empty(x.shape), torch.empty_like(weight), grad_bias, grad_last.new_empty(grad_last.shape)


@operator("recurrent_scan_backward", fake=_backward_shapes)
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
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of h (B, T, D) and of the last states (S, N, D) to those of x (B, T, H * G * P), of the weight
    (H, G * P, P), of R h + b summed over tokens (H * G * P), and of the initial states (S, N, D), the last two in
    float32 (float64 for float64 inputs). `h` and `others` are what `scan` returned; gates are computed again."""
    chosen = backend(__package__, x)
    return chosen.scan_backward(cell, x, weight, bias, states, mask, cu_seqlens, h, others, grad, grad_last, reverse)


def _check(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    perturbation: list[Tensor],
) -> None:
    """Shapes and offsets again, for callers that could not know them (torch.compile) or did not ask: the CPU's loops
    write through raw indices."""
    heads, rows, size = weight.shape
    sequences = check_inputs({"x": x}, mask, cu_seqlens)
    check_packing(cu_seqlens, x)
    expected = {"x": (x, (*x.shape[:2], heads * rows)), "weight": (weight, (heads, CELLS[cell].gates * size, size))}
    if bias is not None:
        expected["bias"] = (bias, (heads * rows,))
    for n, state in enumerate(states):
        expected[f"states[{n}]"] = (state, (sequences, heads * size))
    if perturbation:
        left, right, biases = perturbation
        members, rank = left.shape[0], left.shape[-1]
        if sequences % members:
            raise ValueError(f"x: expected a multiple of M = {members} sequences, got {sequences}")
        expected["left"] = (left, (members, heads, rows, rank))
        expected["right"] = (right, (members, heads, size, rank))
        expected["biases"] = (biases, (members, heads * rows))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if states and len(states) != CELLS[cell].states:
        raise ValueError(f"states: expected {CELLS[cell].states} of a {cell}, or none, got {len(states)}")


def _shapes(cell, x, weight, bias, states, mask, cu_seqlens, training, perturbation, reverse):
    batch, time, _ = x.shape
    units = weight.shape[0] * weight.shape[2]
    count = CELLS[cell].states
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = state_dtype(x)
    return (
        x.new_empty(batch, time, units),
        x.new_empty(batch, time, count - 1 if training else 0, units, dtype=dtype),
        x.new_empty(count, sequences, units, dtype=dtype),
    )


def _save(ctx, inputs, output) -> None:
    cell, x, weight, bias, states, mask, cu_seqlens, training, perturbation, reverse = inputs
    if perturbation:
        raise RuntimeError("perturbed weights have no gradients: call this under torch.no_grad()")
    if not training:
        raise RuntimeError("hf_rnn::recurrent_scan: called with training=False on tensors that require gradients")
    ctx.cell, ctx.reverse = cell, reverse
    ctx.set_materialize_grads(False)  # that of the other states, which nobody differentiates, would be large
    ctx.save_for_backward(x, weight, bias, mask, cu_seqlens, output[0], output[1], *states)


def _backward(ctx, grad, grad_others, grad_last):
    x, weight, bias, mask, cu_seqlens, h, others, *states = ctx.saved_tensors
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if grad is None:
        grad = torch.zeros_like(h)
    if grad_last is None:
        grad_last = h.new_zeros(CELLS[ctx.cell].states, sequences, h.shape[2], dtype=state_dtype(x))
    grad_x, grad_weight, grad_bias, grad_states = scan_backward(
        ctx.cell, x, weight, bias, states, mask, cu_seqlens, h, others, grad, grad_last, ctx.reverse
    )
    grads = [g.to(s.dtype) for g, s in zip(grad_states, states, strict=False)]
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return None, grad_x, grad_weight, grad_bias, grads, None, None, None, [], None


@operator("recurrent_scan", fake=_shapes, backward=_backward, save=_save)
def scan(
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
    """Run the recurrence.

    Args:
        cell: a key of `reference.CELLS`, which gives its number of gates G and of state tensors S.
        x: (B, T, H * G * P), the input's part of the pre-activations.
        weight: (H, G * P, P).
        bias: (H * G * P), added to R h.
        states: initial states, S tensors (N, D), h the first; empty for zeros. N is B, or the number of packed
            sequences; D = H * P.
        mask: (B, T), zero where a token is padding: its state is that of the token read before it.
        cu_seqlens: (N + 1) int offsets of the sequences packed in a batch of one.
        training: whether a backward pass follows, which needs the other states.
        perturbation: empty, or left (M, H, G * P, K), right (M, H, P, K) and biases (M, H * G * P): the N sequences
            are those of M members in turn, whose recurrence is (R + left_m right_m^T) h + biases_m; no training.
        reverse: each sequence is read from its last token to its first; the tokens stay where they lie. No default:
            torch hands backward as many gradients as a call had arguments that differ from theirs.

    Returns:
        h (B, T, D) in the dtype of x; the other states (B, T, S - 1, D) in float32 if training, else (B, T, 0, D);
        the last states (S, N, D) in float32 (float64 for float64 inputs).
    """
    if x.device.type == "cpu":  # the Triton kernels clamp offsets, whose values only the device knows
        _check(cell, x, weight, bias, states, mask, cu_seqlens, perturbation)
    chosen = backend(__package__, x)
    return chosen.scan(cell, x, weight, bias, states, mask, cu_seqlens, training, perturbation, reverse)


def layer(
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
    """The input projection and `scan` of rows, x (B, T, I) to h and the last states. Only programs that torch.export
    makes have it, since other formats know a layer with both as one operator; run, it is the two."""
    y = torch.nn.functional.linear(x, input_weight, input_bias)
    h, _, last = scan(cell, y, weight, bias, states, mask, None, training, [], reverse)
    return h, last


try:
    _ = torch.ops.hf_rnn.recurrent_layer  # of another copy of this package in the process
except AttributeError:
    torch.library.define(
        "hf_rnn::recurrent_layer",
        "(str cell, Tensor x, Tensor input_weight, Tensor? input_bias, Tensor weight, Tensor? bias, Tensor[] states, "
        "Tensor? mask, bool training, bool reverse) -> (Tensor, Tensor)",
    )
    torch.library.impl("hf_rnn::recurrent_layer", "CompositeImplicitAutograd", layer)
