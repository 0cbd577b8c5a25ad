"""Recurrences whose gates see the state: LSTM, GRU and sLSTM, dense or with heads, from input projection to all states.

Shapes: B batch, T time, H heads of P units, D = H * P, N sequences (B, or what `layout.offsets` counts). All take
float32, bfloat16 or float16 (state and gates in float32) or float64, give gradients for every floating argument, and
run as numba code on a CPU, as Triton kernels on a GPU, and as plain torch anywhere else; an LSTM and a GRU of one head
also as torch's own, where these are faster. Pre-activations lie head by head, within a head gate by gate: with one
head, in torch's order. Weights and biases may be `Perturbed`; then there are no gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_rnn_kernels.checks import check_inputs, check_tensors, refuse_forward_mode
from hf_rnn_kernels.layout import ROWS, SequenceLayout, check_layout
from hf_rnn_kernels.perturbed import Perturbed
from hf_rnn_kernels.recurrent_scan import library, op, reference
from hf_rnn_kernels.stepping import advance, record
from hf_rnn_kernels.transforms import tracked


def lstm_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    layout: SequenceLayout = ROWS,
    *,
    input_weight: Tensor | None = None,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM: (i, f, g, o) = x_t + R h_{t-1} + b, c_t = s(f) c_{t-1} + s(i) tanh(g), h_t = s(o) tanh(c_t), s the sigmoid.

    "Long Short-Term Memory" with forget gates, as `torch.nn.LSTM` has it; with several heads, R is block-diagonal
    (FlashRNN, arXiv 2412.07752).

    Args:
        x: input projection (B, T, H * 4 * P): for each head the pre-activations i, f, g, o. With `input_weight` the
            input itself, (B, T, I).
        weight: R, (H, 4 * P, P), floating. One head: torch's `weight_hh` as (1, 4 * D, D).
        bias: (H * 4 * P), added to R h; torch's `bias_hh`. None for zeros.
        h0, c0: initial states (N, D), any floating dtype; zeros by default.
        layout: which tokens are real, which sequences they make, and from which end these are read; sequence n starts
            from h0[n], c0[n]. Rows from their first token on by default. A token that is not real leaves the state as
            it was, and its output is that state.
        input_weight, input_bias: of the input projection, (H * 4 * P, I) and (H * 4 * P) or None; torch's `weight_ih`
            and `bias_ih`. None: x is projected already.

    Returns:
        h (B, T, D) in the dtype of x, and the last states h and c (N, D) in float32 (float64 for float64 inputs); h0
        and c0 themselves, written to, if `layout.in_place` and no gradient flows.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    h, last = _scan("lstm", x, weight, bias, {"h0": h0, "c0": c0}, layout, input_weight, input_bias)
    return h, (last[0], last[1])


def gru_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    layout: SequenceLayout = ROWS,
    *,
    input_weight: Tensor | None = None,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GRU: r, z = sigmoid(x_t + R h_{t-1} + b); n = tanh(x_t + r * (R h_{t-1} + b)); h_t = (1 - z) n + z h_{t-1}.

    As `torch.nn.GRU` has it (reset gate after the product, as in cuDNN), with R block-diagonal over heads.

    Args:
        x: input projection (B, T, H * 3 * P): for each head the pre-activations r, z, n. With `input_weight` the input
            itself, (B, T, I).
        weight: R, (H, 3 * P, P), floating. One head: torch's `weight_hh` as (1, 3 * D, D).
        bias: (H * 3 * P), added to R h, so that r multiplies its part in n (b_hn); torch's `bias_hh`. None for zeros.
        h0: initial states (N, D), any floating dtype; zeros by default.
        layout: as in `lstm_scan`.
        input_weight, input_bias: of the input projection, (H * 3 * P, I) and (H * 3 * P) or None; torch's `weight_ih`
            and `bias_ih`. None: x is projected already.

    Returns:
        h (B, T, D) in the dtype of x, and the last states (N, D) in float32 (float64 for float64 inputs); h0 itself,
        written to, if `layout.in_place` and no gradient flows.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    h, last = _scan("gru", x, weight, bias, {"h0": h0}, layout, input_weight, input_bias)
    return h, last[0]


def slstm_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    n0: Tensor | None = None,
    m0: Tensor | None = None,
    layout: SequenceLayout = ROWS,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """sLSTM: an LSTM with exponential input gates, its cell a mean with these weights.

        (i, f, z, o) = x_t + R h_{t-1} + b
        c_t = exp(log s(f) + m_{t-1} - m_t) c_{t-1} + exp(i - m_t) tanh(z), n_t = the same of n_{t-1} and 1,
        m_t = max(log s(f) + m_{t-1}, i), h_t = s(o) c_t / n_t, s the sigmoid.

    Where n_{t-1} = 0, a unit has nothing to remember: m_t = i, and c_{t-1} does not count. That is how sequences start
    by default. "xLSTM", arXiv 2405.04517, with the paper's sigmoid forget gate, R block-diagonal. Gradients are those
    of these equations, through the maximum, too (at a tie, that of its first argument).

    Args:
        x: input projection (B, T, H * 4 * P): for each head the pre-activations i, f, z, o.
        weight: R, (H, 4 * P, P), floating.
        bias: (H * 4 * P), added to R h. None for zeros.
        h0, c0, n0, m0: initial states (N, D), any floating dtype; zeros by default.
        layout: as in `lstm_scan`.

    Returns:
        h (B, T, D) in the dtype of x, and the last states h, c, n and m (N, D) in float32 (float64 for float64 inputs);
        h0 to m0 themselves, written to, if `layout.in_place` and no gradient flows.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    h, last = _scan("slstm", x, weight, bias, {"h0": h0, "c0": c0, "n0": n0, "m0": m0}, layout)
    return h, (last[0], last[1], last[2], last[3])


def _scan(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: dict[str, Tensor | None],
    layout: SequenceLayout,
    input_weight: Tensor | None = None,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    check_layout(layout)
    if layout.recorded:

        def read_piece(layout, inputs, states):
            return _scan(cell, inputs[0], weight, bias, dict(zip(initial, states, strict=True)), layout)

        whole = x if input_weight is None else linear(x, input_weight, input_bias)
        if (found := _every_state(cell, whole, weight, bias, initial, layout)) is not None:
            return found
        return record(layout, [whole], initial.values(), read_piece)
    states: list[Tensor] = [state for state in initial.values() if state is not None]
    weights = None if input_weight is None else library.Weights(input_weight, input_bias, weight, bias)

    def by_cell(states):
        return None if weights is None else library.cell_step(cell, x, weights, states, layout)

    # A token costs its calls: torch's cell, if it takes this step, checks its arguments itself
    single = layout.in_place and len(states) == len(initial) and x.dim() == 3 and x.shape[1] == 1
    if single and not tracked(x, *(weights or ()), *states) and (h := by_cell(states)) is not None:
        return h, states
    gates = reference.CELLS[cell].gates
    if weight.dim() != 3 or weight.shape[1] != gates * weight.shape[2]:
        raise ValueError(f"weight: expected shape (H, {gates} * P, P), got {tuple(weight.shape)}")
    heads, rows, size = weight.shape
    sequences = check_inputs({"x": x}, layout.mask, layout.offsets)
    if input_weight is None and x.shape[2] != heads * rows:
        raise ValueError(f"x: expected {heads * rows} = H * {gates} * P channels for this weight, got {x.shape[2]}")
    shapes = {
        "weight": (weight, weight.shape),
        "bias": (bias, (heads * rows,)),
        "input_weight": (input_weight, (heads * rows, x.shape[2])),
        "input_bias": (input_bias, (heads * rows,)),
        **{name: (state, (sequences, heads * size)) for name, state in initial.items()},
    }
    check_tensors(shapes, x, "x")
    if states:
        zeros = x.new_zeros(sequences, heads * size, dtype=reference.state_dtype(x))
        states = [zeros if state is None else state for state in initial.values()]
        if any(state is None for state in initial.values()):
            layout = layout._replace(in_place=False)  # zeros of ours are nobody's buffer
    refuse_forward_mode(x, weight, bias, input_weight, input_bias, *states)
    plain, plain_bias, perturbation = _perturbation(weight, bias)

    def projected():
        return x if input_weight is None else linear(x, input_weight, input_bias)

    def one_token(states):
        if (h := by_cell(states)) is not None:
            return h
        return reference.decode(cell, projected(), plain, plain_bias, states, layout.mask, perturbation)

    def any_tokens(training):
        if weights is not None and (found := library.run(cell, x, weights, states, layout)) is not None:
            return found
        if weights is not None and torch.compiler.is_exporting() and layout.offsets is None and not perturbation:
            options = layout.mask, training, layout.reverse
            return torch.ops.hf_rnn.recurrent_layer(cell, x, *weights[:2], plain, plain_bias, states, *options)
        y = layout.flat(projected())
        h, _, last = op.scan(
            cell,
            y,
            plain,
            plain_bias,
            states,
            layout.flat_mask(),
            layout.offsets,
            training,
            perturbation,
            layout.reverse,
        )
        return h.view(*x.shape[:2], heads * size), last

    inputs = x, plain, plain_bias, input_weight, input_bias
    return advance(layout, x.shape[1], reference.state_dtype(x), inputs, states, one_token, any_tokens)


def _every_state(
    cell: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: dict[str, Tensor | None],
    layout: SequenceLayout,
) -> tuple[Tensor, list[Tensor]] | None:
    """What `stepping.record` gives, by one compiled loop, where it has these states: in their own dtype, and with the
    gradient that is asked for, which the operator takes of h alone."""
    tensors = x, weight, bias, *initial.values()
    wanted = tracked(*tensors) and len(initial) > 1
    if wanted or x.dtype != reference.state_dtype(x) or any(isinstance(p, Perturbed) for p in (weight, bias)):
        return None
    if layout.offsets is not None or layout.reverse or layout.recorded > x.shape[1] or x.dim() != 3:
        return None  # which `record` refuses
    units = weight.shape[0] * weight.shape[2]
    states = [x.new_zeros(len(x), units) if s is None else s.to(x.dtype) for s in initial.values()]
    h, others, _ = op.scan(cell, x, weight, bias, states, layout.mask, None, True, [], False)
    return h, [s[:, -layout.recorded :] for s in (h, *others.unbind(2))]


def _perturbation(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Weight and bias as plain tensors, and what `op.scan` takes for the members' own."""
    if not isinstance(weight, Perturbed) and not isinstance(bias, Perturbed):
        return weight, bias, []
    if isinstance(weight, Perturbed) and weight.left is None:
        if weight.members > 1:
            raise ValueError("weight: several members need a perturbation of low rank")
        weight = weight.materialize()
    heads, rows, size = weight.shape
    if isinstance(weight, Perturbed):
        members, left, right, weight = weight.members, weight.left, weight.right, weight.base()
    else:
        members = bias.members  # type: ignore[union-attr]
        left, right = weight.new_zeros(members, heads, rows, 1), weight.new_zeros(members, heads, size, 1)
    if isinstance(bias, Perturbed):
        biases = bias.copies()
    else:
        biases = (weight.new_zeros(heads * rows) if bias is None else bias).expand(members, -1)
    return weight, None, [left, right, biases]  # type: ignore[list-item]
