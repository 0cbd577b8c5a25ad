"""Cuts of a batch of sequences: what a memory is made of, and what it has to predict.

x (B, T) are the tokens that the network takes in, y (B, T) what is to be predicted after each, -100 for nothing:
y_t is what follows x_t, never x_t itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """x, y (B, T), real tokens first, and how many are real, (B,)."""

    x: Tensor
    y: Tensor
    lengths: Tensor


def sequences(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Sequences:
    """A batch as causal language models take it (B, T + 1), whose labels are those of the token before.

    Raises:
        ValueError: rows of fewer than two tokens, labels of another shape, or a mask of other values than 0 and 1.
    """
    if input_ids.dim() != 2 or input_ids.shape[1] < 2 or labels.shape != input_ids.shape:
        raise ValueError(
            "input_ids, labels: expected the same shape (B, T), T at least 2, got "
            f"{tuple(input_ids.shape)} and {tuple(labels.shape)}"
        )
    if attention_mask is not None:
        real = attention_mask.bool()
        if not bool((attention_mask == real).all()):
            raise ValueError("attention_mask: expected zeros at padding and ones elsewhere, got other values")
        order = real.logical_not().long().argsort(dim=1, stable=True)
        input_ids, labels = input_ids.gather(1, order), labels.masked_fill(~real, -100).gather(1, order)
        lengths = (real.sum(1) - 1).clamp(min=0)
    else:
        lengths = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
    return Sequences(input_ids[:, :-1], labels[:, 1:], lengths)


def sample_positions(
    batch: Sequences, count: int, first_share: float, labelled_share: float, generator: torch.Generator
) -> Tensor:
    """`count` positions a row, (B, count): uniform over real tokens, but for the shares of rows that take the first
    token (whose memory before is the empty one) or a position with something to predict."""
    position = torch.arange(batch.x.shape[1], device=batch.x.device)
    real = (position < batch.lengths[:, None]).double()
    first = (position == 0).double().expand_as(real)
    labelled = (batch.y != -100).double() * real
    some = labelled.sum(1, keepdim=True) > 0
    weights = (1 - first_share - labelled_share) * _share(real) + first_share * first
    weights = weights + labelled_share * torch.where(some, _share(labelled), _share(real))
    weights = torch.where(batch.lengths[:, None] > 0, weights, first)
    return weights.cpu().multinomial(count, replacement=True, generator=generator).to(batch.x.device)


def _share(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True).clamp(min=1)


def chunks(lengths: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The real tokens of every row in chunks of at most `size`: rows, first tokens and ends (N,) each.

    The first chunk of a row, from the empty memory, has 1 to `size` tokens by chance, so that every position begins a
    chunk as often.
    """
    if size == 1:  # which draws nothing: the paper's steps
        offset = torch.ones_like(lengths)
    else:
        offset = torch.randint(1, size + 1, lengths.shape, generator=generator).to(lengths.device)
    position = torch.arange(max(lengths.tolist(), default=0), device=lengths.device)
    begins = (position == 0) | ((position - offset[:, None]) % size == 0)
    rows, start = (begins & (position < lengths[:, None])).nonzero().unbind(1)
    end = torch.where(start == 0, offset[rows], start + size)
    return rows, start, end.minimum(lengths[rows])


def contexts(x: Tensor, rows: Tensor, t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` tokens up to and with x_t of rows, (N, size), and which of them there are: padded on the left."""
    index = t[:, None] + torch.arange(1 - min(size, x.shape[1]), 1, device=x.device)
    return x[rows[:, None], index.clamp(min=0)], index >= 0


def futures(batch: Sequences, rows: Tensor, t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What a memory of x_0..x_t has to predict, y_t..y_{t+size-1} (N, size), and the tokens that come to its help,
    x_{t+1}..x_{t+size-1}: the first is predicted from the memory alone, y_{t+j} with the help of x up to x_{t+j}."""
    time = batch.x.shape[1]
    index = t[:, None] + torch.arange(min(size, time), device=t.device)
    inside = index < batch.lengths[rows, None]
    index = index.clamp(max=time - 1)
    return batch.x[rows[:, None], index[:, 1:]], batch.y[rows[:, None], index].masked_fill(~inside, -100)
