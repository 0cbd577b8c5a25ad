"""One token or many: the way from an op's public function to its operators."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_rnn_kernels.layout import SequenceLayout
from hf_rnn_kernels.transforms import tracked, transforming

States = Sequence[Tensor]


def advance(
    layout: SequenceLayout,
    time: int,
    dtype: torch.dtype,
    inputs: Sequence[Tensor | None],
    states: States,
    one_token: Callable[[States], Tensor],
    any_tokens: Callable[[bool], tuple[Tensor, States]],
) -> tuple[Tensor, States]:
    """Run a recurrence over `time` tokens a row.

    Args:
        dtype: of the last states.
        inputs: what gradients may flow to, beside the states.
        states: before the first token; none for zeros.
        one_token: one token a row, by the decoding operator: writes the states after it over those it is given.
        any_tokens: any number of tokens: whether a backward pass follows to h and the last states, new tensors.

    Returns:
        h, and the last states: those given where the layout says that they are written `in_place` and no gradient
        flows, else new ones.
    """
    training = tracked(*inputs, *states)
    in_place = layout.in_place and not training
    # Under vmap a state that all elements share cannot be written over by each.
    single = time == 1 and layout.offsets is None and not training and not transforming()
    if single and states and not torch.compiler.is_exporting():
        buffers = [s if in_place and _fits(s, dtype) else _copy(s, dtype) for s in states]
        h = one_token(buffers)
        if not in_place:
            return h, buffers
        for state, buffer in zip(states, buffers, strict=True):
            if buffer is not state:
                state.copy_(buffer)
        return h, states
    h, last = any_tokens(training)
    if not in_place or not states:
        return h, last
    for old, new in zip(states, last, strict=True):
        old.copy_(new)
    return h, states


def record(
    layout: SequenceLayout, inputs: Sequence[Tensor], states: Any, run: Callable[..., tuple[Tensor, Any]]
) -> tuple[Tensor, list[Tensor]]:
    """Run a recurrence so that it returns the states after each of the last `layout.recorded` tokens: what is before
    these at once, then one token after another.

    Args:
        inputs: (B, T, ...).
        states: before the first token, as `run` takes them.
        run: layout, inputs and states to the output (B, T, ...) and the sequence of last states (B, ...).

    Returns:
        The output, and each state as (B, recorded, ...).

    Raises:
        ValueError: packed or reversed sequences, or fewer tokens than are to be recorded.
    """
    time = inputs[0].shape[1]
    if layout.offsets is not None or layout.reverse or layout.recorded > time:
        raise ValueError(
            f"layout.recorded: expected rows of at least {layout.recorded} tokens, read from their first on, got "
            f"{'packed' if layout.offsets is not None else 'reversed' if layout.reverse else time}"
        )
    first = time - layout.recorded
    plain = layout._replace(in_place=False, recorded=0)
    outputs, kept = [], []
    for start, stop in pairwise([*([0] if first else []), *range(first, time + 1)]):
        mask = None if layout.mask is None else layout.mask[:, start:stop]
        y, states = run(plain._replace(mask=mask), [x[:, start:stop] for x in inputs], states)
        outputs.append(y)
        if stop > first:
            kept.append(states)
    return torch.cat(outputs, 1), [torch.stack(each, 1) for each in zip(*kept, strict=True)]


def _fits(state: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can compute in these tensors themselves: it takes them for dense, in its own dtype."""
    return state.dtype == dtype and state.is_contiguous()


def _copy(state: Tensor, dtype: torch.dtype) -> Tensor:
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)
