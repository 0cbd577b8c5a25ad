"""mLSTM: a matrix memory with exponential input gates, computed for all tokens of a chunk at once.

Runs as numba code on a CPU, as Triton kernels on a GPU, and as plain torch anywhere else, for any T.
"""

from torch import Tensor

from hf_rnn_kernels.checks import refuse_forward_mode
from hf_rnn_kernels.layout import ROWS, SequenceLayout, check_layout
from hf_rnn_kernels.mlstm_scan import op, reference
from hf_rnn_kernels.mlstm_scan.reference import States
from hf_rnn_kernels.stepping import advance, record


def mlstm_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C0: Tensor | None = None,
    n0: Tensor | None = None,
    m0: Tensor | None = None,
    layout: SequenceLayout = ROWS,
    eps: float = 1e-6,
) -> tuple[Tensor, States]:
    """mLSTM: C_t = f' C_{t-1} + i' k_t v_t^T, n_t = f' n_{t-1} + i' k_t, and h_t = C_t^T q_t over
    max(|n_t q_t|, e^-m_t) + eps.

    Where m_t = max(log sigmoid(f_t) + m_{t-1}, i_t), f' = sigmoid(f_t) e^(m_{t-1} - m_t), i' = e^(i_t - m_t), and q is
    divided by sqrt(K): "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517), stabilised as in its appendix. The
    memory that C and n stand for is C e^m and n e^m; but for eps, h does not depend on m.

    Shapes: B batch, T time, H heads, K and V channels of a head's keys and values, N sequences (B, or what
    `layout.offsets` counts). Takes float32, bfloat16 or float16 (states and gates in float32) or float64, and
    gives the gradient of every floating argument.

    Args:
        q, k: (B, T, H, K). v: (B, T, H, V). One dtype.
        i, f: pre-activations of the input and the forget gate (B, T, H), in any one floating dtype.
        C0, n0, m0: initial states (N, H, K, V), (N, H, K), (N, H), any floating dtype, m0 finite; zeros by default.
        layout: which tokens are real, which sequences they make and from which end these are read; sequence n starts
            from C0[n], n0[n], m0[n]. Rows by default. A token that is not real leaves the states as they were, and its
            h is zero.
        eps: added to the normaliser; 1e-6 is the published models'.

    Returns:
        h (B, T, H, V) in the dtype of q, and the last C, n and m in float32 (float64 for float64 inputs); C0, n0 and m0
        themselves, written to, if all three are given, `layout.in_place` is set and no gradient flows.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device than above, named in the message.
    """
    check_layout(layout)
    if layout.recorded:

        def read_piece(layout, inputs, states):
            return mlstm_scan(*inputs, *states, layout=layout, eps=eps)

        h, (C, n, m) = record(layout, (q, k, v, i, f), (C0, n0, m0), read_piece)
        return h, (C, n, m)
    given = {name: s for name, s in (("C0", C0), ("n0", n0), ("m0", m0)) if s is not None}
    op.check_shapes(q, k, v, i, f, given, layout.mask, layout.offsets)
    refuse_forward_mode(q, k, v, i, f, *given.values())
    states: list[Tensor] = []
    if len(given) == 3:
        states = list(given.values())
    elif given:
        zeros = reference.initial_states(q, v, layout.sequences(q.shape[0]))
        states = [zero if s is None else s for zero, s in zip(zeros, (C0, n0, m0), strict=True)]
        layout = layout._replace(in_place=False)  # zeros of ours are nobody's buffer

    def one_token(states):
        real = None if layout.mask is None else layout.mask[:, 0]
        return mlstm_step(q[:, 0], k[:, 0], v[:, 0], i[:, 0], f[:, 0], *states, real=real, eps=eps)[:, None]

    def any_tokens(training):
        inputs = (layout.flat(x) for x in (q, k, v, i, f))
        h, _, *last = op.scan(*inputs, states, layout.flat_mask(), layout.offsets, eps, training, layout.reverse)
        return h.view(v.shape), last

    h, (C, n, m) = advance(layout, q.shape[1], reference.state_dtype(q), (q, k, v, i, f), states, one_token, any_tokens)
    return h, (C, n, m)


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    real: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One token of `mlstm_scan`, for decoding: no checks, no gradients. Reads and writes C once.

    Args:
        q, k: (B, H, K). v: (B, H, V). i, f: (B, H).
        C, n, m: the states before it, (B, H, K, V), (B, H, K), (B, H), in float32 (float64 for float64 inputs),
            contiguous; they become those after it.
        real: (B,) bool, False where the token is padding: there the states stay, and h is zero. None: all are real.

    Returns:
        h (B, H, V) in the dtype of q.
    """
    return op.decode(q, k, v, i, f, C, n, m, real, eps)
