"""Gated linear recurrences: linear_scan, and minGRU and minLSTM fused from pre-activations to states.

Shapes: B batch, T time, D channels, N sequences (B, or what `layout.offsets` counts). All three take
float32, bfloat16 or float16 (recurrence in float32) or float64, give gradients for every floating argument, and run
as numba code on a CPU, as Triton kernels on a GPU, and as plain torch anywhere else.
"""

from torch import Tensor

from hf_rnn_kernels.checks import check_inputs, check_tensors, refuse_forward_mode
from hf_rnn_kernels.gated_scan import op, reference
from hf_rnn_kernels.layout import ROWS, SequenceLayout, check_layout
from hf_rnn_kernels.stepping import advance, record


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, layout: SequenceLayout = ROWS) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t, elementwise over channels.

    Args:
        a, b: (B, T, D), same shape, dtype and device.
        h0: initial states (N, D), any sign, any floating dtype; zeros by default.
        layout: which tokens are real and which sequences they make; sequence n starts from h0[n]. Rows by default. A
            token that is not real leaves the state as it was, and its h is that state.

    Returns:
        h (B, T, D) in the dtype of `a` and the last states (N, D) in float32 (float64 for float64 inputs); h0 itself,
        written to, if `layout.in_place` and no gradient flows.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    return _scan("linear", {"a": a, "b": b}, h0, layout)


def min_gru_scan(
    gate: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    layout: SequenceLayout = ROWS,
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
        h0, layout: as in `linear_scan`.
        use_g: False gives the variant whose candidate is linear (section 3.1, before log-space).

    Returns:
        As `linear_scan`.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    return _scan("min_gru+g" if use_g else "min_gru", {"gate": gate, "candidate": candidate}, h0, layout)


def min_lstm_scan(
    forget: Tensor,
    input: Tensor,
    candidate: Tensor,
    h0: Tensor | None = None,
    layout: SequenceLayout = ROWS,
    *,
    use_g: bool = True,
    normalize: bool = True,
) -> tuple[Tensor, Tensor]:
    """minLSTM: f, i = sigmoid(forget), sigmoid(input); h_t = f' h_{t-1} + i' g(candidate_t).

    "Were RNNs All We Needed?" (arXiv 2410.01201), section 3.2: f' = f / (f + i) and i' = i / (f + i).

    Args:
        forget, input, candidate: pre-activations (B, T, D), same shape, dtype and device.
        h0, layout, use_g: as in `min_gru_scan`.
        normalize: False gives f' = f, i' = i, the default of the authors' code; the paper's text normalises.

    Returns:
        As `linear_scan`.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    gates = "min_lstm" + "+g" * use_g + "+normalize" * normalize
    return _scan(gates, {"forget": forget, "input": input, "candidate": candidate}, h0, layout)


def _scan(gates: str, inputs: dict[str, Tensor], h0: Tensor | None, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    check_layout(layout)
    sequences = check_inputs(inputs, layout.mask, layout.offsets)
    first_name, first = next(iter(inputs.items()))
    check_tensors({"h0": (h0, (sequences, first.shape[2]))}, first, first_name)
    tensors = list(inputs.values())
    refuse_forward_mode(*tensors, h0)
    if layout.recorded:

        def read_piece(layout, tensors, state):
            h, last = _scan(gates, dict(zip(inputs, tensors, strict=True)), state[0], layout)
            return h, (last,)

        h, (last,) = record(layout, tensors, (h0,), read_piece)
        return h, last

    def one_token(states):
        return reference.decode(gates, tensors, states[0], layout.mask)

    def any_tokens(training):
        rows = [layout.flat(x) for x in tensors]
        h, last = op.scan(gates, rows, h0, layout.flat_mask(), layout.offsets, layout.reverse)
        return h.view(first.shape), [last]

    states = [] if h0 is None else [h0]
    h, (last,) = advance(layout, first.shape[1], reference.state_dtype(first), tensors, states, one_token, any_tokens)
    return h, last
