"""Losses at perturbed weights: many members in one forward pass where the model can, one after another anywhere."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_rnn_kernels import Perturbed
from hf_rnn_trainers.zo.directions import Directions

Member = tuple[int, int]  # a direction, and the sign of its epsilon (0: the weights themselves)
LOGITS = 2**24  # elements of the largest tensor of logits


class _Call(nn.Module):
    """Any function of a model as a module's forward, for `functional_call`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def call_with(model: nn.Module, parameters: dict[str, Tensor], function: Callable[[], Any]) -> Any:
    """function() while `parameters` stand in the place of the model's; these are left as they are, come what may."""
    parameters = {f"model.{name}": p for name, p in parameters.items()}
    with torch.no_grad():
        return torch.func.functional_call(_Call(model), parameters, (function,))


def perturbed(
    directions: Directions, step: int, members: Sequence[Member], epsilon: float, rows: int = 1
) -> dict[str, Tensor]:
    """The parameters w + sign * epsilon * delta of the members, `rows` batch rows each."""
    if all(sign == 0 for _, sign in members):
        return {}
    if directions.kind != "low_rank":
        ((j, sign),) = members
        return {name: _dense(directions, name, step, j, sign * epsilon) for name in directions.parameters}
    used = sorted({j for j, _ in members})
    device = next(iter(directions.parameters.values()))[1].device
    where = torch.tensor([used.index(j) for j, _ in members], device=device)
    amount = torch.tensor([sign * epsilon for _, sign in members], device=device)
    new: dict[str, Tensor] = {}
    for name, pieces in directions.factors(step, used, device).items():
        p = directions.parameters[name][1]
        dtype = torch.promote_types(p.dtype, torch.float32)
        first, *second = (x[where].to(p.device, dtype) for x in pieces)
        scale = amount.to(p.device, dtype).view(-1, *(1,) * (first.dim() - 1))
        if second:
            left = first * (scale / math.sqrt(directions.rank))
            new[name] = Perturbed.of_low_rank(p, left, second[0], rows)
        else:
            offset = first * scale
            new[name] = Perturbed.of_offset(p, lambda offset=offset: offset, len(members), rows)
    return new


def _dense(directions: Directions, name: str, step: int, j: int, amount: float) -> Perturbed:
    p = directions.parameters[name][1]
    return Perturbed.of_offset(p, lambda: amount * directions.dense(name, step, j)[None])


@contextmanager
def moved(directions: Directions, step: int, member: Member, epsilon: float, in_place: bool) -> Iterator[None]:
    """The model's own weights changed to w + sign * epsilon * delta, and back: from a copy, or by subtraction."""
    parameters = [(name, p) for name, (_, p) in directions.parameters.items()]
    before = None if in_place else [p.detach().clone() for _, p in parameters]
    j, sign = member

    def add(amount: float) -> None:
        for name, p in parameters:
            p.add_(directions.dense(name, step, j).to(p.dtype), alpha=amount)

    with torch.no_grad():
        add(sign * epsilon)
        try:
            yield
        finally:
            if before is None:
                add(-sign * epsilon)
            else:
                for (_, p), old in zip(parameters, before, strict=True):
                    p.copy_(old)


def stream_losses(model: Any, inputs: dict[str, Tensor], chunk_size: int) -> tuple[Tensor, Tensor]:
    """Next-token losses, `chunk_size` tokens at a time with the state carried along: memory does not depend on T.

    Args:
        model: a causal language model of the package, the members' parameters in it.
        inputs: `input_ids` and `labels`, perhaps `attention_mask`, (M, B, T): each member's rows, or the same for all.
        chunk_size: tokens of a row at a time.

    Returns:
        Summed losses (M,) in float64, and the number of tokens they are of (M,).
    """
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    members, _, time = labels.shape
    state, sums = None, torch.zeros(members, dtype=torch.float64, device=labels.device)
    for start in range(0, time - 1, chunk_size):
        stop = min(start + chunk_size, time - 1)
        outputs = model.model(
            inputs["input_ids"][..., start:stop].flatten(0, 1),
            attention_mask=None if mask is None else mask[..., start:stop].flatten(0, 1),
            cache=state,
            use_cache=True,
        )
        state, hidden = outputs.cache, outputs.last_hidden_state
        targets = labels[..., start + 1 : stop + 1].flatten(0, 1)
        for h, target in zip(*_pieces(hidden, targets, model.config.vocab_size), strict=True):
            logits = model.logits(h)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            losses = nn.functional.cross_entropy(logits, target.flatten(), reduction="none")
            sums += losses.view(members, -1).sum(1, dtype=torch.float64)
    return sums, (labels[..., 1:] != -100).sum((1, 2))


def _pieces(hidden: Tensor, targets: Tensor, vocabulary: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Cut along time so that logits of a piece are not too many."""
    time = max(1, LOGITS // (hidden.shape[0] * vocabulary))
    return hidden.split(time, 1), targets.split(time, 1)
