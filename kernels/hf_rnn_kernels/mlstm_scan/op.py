"""`hf_rnn::mlstm_scan`, and `hf_rnn::mlstm_step` for decoding."""

import torch
from torch import Tensor

from hf_rnn_kernels.checks import check_inputs
from hf_rnn_kernels.layout import check_packing
from hf_rnn_kernels.mlstm_scan.reference import state_dtype
from hf_rnn_kernels.operators import backend, operator


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: dict[str, Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise TypeError or ValueError for arguments that do not fit each other."""
    sequences = check_inputs({"i": i, "f": f}, mask, cu_seqlens)
    if q.dim() != 4 or q.shape[:3] != i.shape or q.shape[3] < 1:
        raise ValueError(f"q: expected shape (B, T, H, K) with (B, T, H) of i, {tuple(i.shape)}, got {tuple(q.shape)}")
    if v.dim() != 4 or v.shape[:3] != i.shape or v.shape[3] < 1:
        raise ValueError(f"v: expected shape (B, T, H, V) with (B, T, H) of i, {tuple(i.shape)}, got {tuple(v.shape)}")
    heads, keys, values = *q.shape[2:], v.shape[3]
    shapes = {"C0": (sequences, heads, keys, values), "n0": (sequences, heads, keys), "m0": (sequences, heads)}
    expected = {"k": (k, tuple(q.shape))} | {name: (state, shapes[name]) for name, state in states.items()}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor in {"q": q, "k": k, "v": v, **states}.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if tensor.device != i.device:
            raise ValueError(f"{name}: expected on the device of i, {i.device}, got {tensor.device}")
    for name, tensor in {"k": k, "v": v}.items():
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")


def _new_states(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = [(q.shape[3], v.shape[3]), (q.shape[3],), ()]
    return [q.new_empty(sequences, q.shape[2], *shape, dtype=state_dtype(q)) for shape in shapes]


def _backward_shapes(q, k, v, i, f, states, mask, cu_seqlens, eps, h, norms, grad, grad_last, reverse):
    return (*(x.new_empty(x.shape) for x in (q, k, v, i, f)), *_new_states(q, v, cu_seqlens))


@operator("mlstm_scan_backward", fake=_backward_shapes)
def scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    states: list[Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    h: Tensor,
    norms: Tensor,
    grad: Tensor,
    grad_last: list[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the gradients of h (B, T, H, V) and of the last C, n and m (empty for zeros) to those of q, k, v, i and f,
    each like its tensor, and of the initial C, n and m in float32 (float64 for float64 inputs). `h` and `norms` are
    what `scan` returned; states between chunks are computed again."""
    chosen = backend(__package__, q)
    return chosen.scan_backward(q, k, v, i, f, states, mask, cu_seqlens, eps, h, norms, grad, grad_last, reverse)


def _shapes(q, k, v, i, f, states, mask, cu_seqlens, eps, training, reverse):
    norms = i.new_empty(*i.shape, 2 * training, dtype=state_dtype(q))
    return (q.new_empty(v.shape), norms, *_new_states(q, v, cu_seqlens))


def _save(ctx, inputs, output) -> None:
    q, k, v, i, f, states, mask, cu_seqlens, eps, training, reverse = inputs
    if not training:
        raise RuntimeError("hf_rnn::mlstm_scan: called with training=False on tensors that require gradients")
    ctx.eps, ctx.reverse = eps, reverse
    ctx.set_materialize_grads(False)  # zeros for the last states, which few differentiate, would cost time
    ctx.save_for_backward(q, k, v, i, f, mask, cu_seqlens, output[0], output[1], *output[2:], *states)


def _backward(ctx, grad, _, *grad_last):
    q, k, v, i, f, mask, cu_seqlens, h, norms, *both = ctx.saved_tensors
    last, states = both[:3], both[3:]
    if grad is None:
        grad = torch.zeros_like(h)
    given = any(g is not None for g in grad_last)
    grads = [torch.zeros_like(s) if g is None else g for g, s in zip(grad_last, last, strict=True)] if given else []
    *of_inputs, C, n, m = scan_backward(
        q, k, v, i, f, states, mask, cu_seqlens, ctx.eps, h, norms, grad, grads, ctx.reverse
    )
    of_states = [g.to(s.dtype) for g, s in zip((C, n, m), states, strict=False)]
    return *of_inputs, of_states, None, None, None, None, None


@operator("mlstm_scan", fake=_shapes, backward=_backward, save=_save)
def scan(
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
    """Run the recurrence.

    Args:
        q, k: (B, T, H, K). v: (B, T, H, V). Any strides; the last dimension is best contiguous.
        i, f: pre-activations (B, T, H) of the input gate (exponential) and of the forget gate (sigmoid).
        states: C (N, H, K, V), n (N, H, K) and m (N, H) to start from; empty for zeros. N is B, or the number of
            packed sequences.
        mask: (B, T), zero where a token is padding: it leaves the states as they were, and its h is zero.
        cu_seqlens: (N + 1) int offsets of the sequences packed in a batch of one.
        eps: added to the normaliser.
        training: whether a backward pass follows, which needs the second result.
        reverse: each sequence is read from its last token to its first; the tokens stay where they lie. No default:
            torch takes from backward as many gradients as a call had arguments that differ from theirs.

    Returns:
        h (B, T, H, V) in the dtype of q; n_t q_t and m_t (B, T, H, 2) if training, else (B, T, H, 0); the last states
        C, n and m; all but h in float32 (float64 for float64 inputs).
    """
    if q.device.type == "cpu":  # again, for callers that could not know or did not ask: the loops trust it
        check_shapes(q, k, v, i, f, dict(zip(("C0", "n0", "m0"), states, strict=False)), mask, cu_seqlens)
        check_packing(cu_seqlens, q)
    return backend(__package__, q).scan(q, k, v, i, f, states, mask, cu_seqlens, eps, training, reverse)


def _step_shapes(q, k, v, i, f, C, n, m, real, eps):
    return v.new_empty(v.shape, dtype=q.dtype)


@operator("mlstm_step", fake=_step_shapes, mutates=("C", "n", "m"))
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor,
    n: Tensor,
    m: Tensor,
    real: Tensor | None,
    eps: float,
) -> Tensor:
    """See `mlstm_step`."""
    return backend(__package__, C).decode(q, k, v, i, f, C, n, m, real, eps)


def decode(*arguments) -> Tensor:
    """`step`, as an operator for the compiler alone: a call through torch's dispatcher costs as much as several of a
    small model's (docs/log.md, 2026-11-30)."""
    *_, C, _, _, _, _ = arguments
    return step(*arguments) if torch.compiler.is_compiling() else backend(__package__, C).decode(*arguments)
