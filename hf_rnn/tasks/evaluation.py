"""Held-out compression: bits per byte of a text, read as one stream with the state carried along."""

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel


@torch.no_grad()
def stream_loss(model: PreTrainedModel, ids: Tensor, chunk: int = 4096, progress: bool = False) -> float:
    """Summed loss in nats of `ids` (T,) after the first token; memory does not depend on T.

    Args:
        model: a causal language model of this package.
        ids: one sequence of token ids.
        chunk: tokens a forward pass.
        progress: show a progress bar.
    """
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"ids: expected one sequence of at least 2 tokens, got shape {tuple(ids.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    was_training = model.training
    model.eval()
    ids = ids.to(model.device)[None]
    total, state = 0.0, None
    for start in tqdm(range(0, ids.shape[1] - 1, chunk), desc="evaluating", disable=not progress):
        piece = ids[:, start : start + chunk + 1]
        outputs = model(piece[:, :-1], cache=state, use_cache=True)
        state = outputs.cache
        logits = outputs.logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, piece[0, 1:].long(), reduction="sum").item()
    model.train(was_training)
    return total


@torch.no_grad()
def loss_by_position(
    model: PreTrainedModel, ids: Tensor, rows: int = 16, chunk: int = 1024, progress: bool = False
) -> dict[int, float]:
    """Mean loss in nats over the distance from the start: of tokens 1, 2 and 3, 4 to 7, 8 to 15, ...; memory does not
    depend on T. What a model does far beyond the length that it was trained on (length extrapolation).

    Args:
        model: a causal language model of this package.
        ids: (T,) token ids, cut into `rows` parts of one length, each read from the initial state; what is left over at
            the end is not read.
        chunk: tokens of each part a forward pass.
        progress: show a progress bar.

    Returns:
        The first distance of each range, in tokens read before, and the loss.
    """
    length = len(ids) // rows if ids.dim() == 1 and rows > 0 else 0
    if length < 2:
        raise ValueError(f"ids: expected one sequence of at least 2 tokens for each of {rows} rows, got {len(ids)}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    was_training = model.training
    model.eval()
    parts = ids[: rows * length].view(rows, length).to(model.device).long()
    sums, counts, state = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64), None
    for start in tqdm(range(0, length - 1, chunk), desc="evaluating", disable=not progress):
        piece = parts[:, start : start + chunk + 1]
        outputs = model(piece[:, :-1], cache=state, use_cache=True)
        state = outputs.cache
        logits, targets = outputs.logits.float(), piece[:, 1:]
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        read = torch.arange(start + 1, start + piece.shape[1])
        which = read.double().log2().floor().long()
        sums.index_add_(0, which, nats.view(rows, -1).double().mean(0).cpu())
        counts += torch.bincount(which, minlength=64)
    model.train(was_training)
    return {2**i: float(sums[i] / counts[i]) for i in range(64) if counts[i]}


def bits_per_byte(model: PreTrainedModel, ids: Tensor, num_bytes: int, **options) -> float:
    """`stream_loss` in bits, over the bytes of the text that was read after the first token (`hf_rnn.cli.data.tokenize`
    tells): of the text itself, not of what the tokens decode to.

    Raises:
        ValueError: no such bytes.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes: expected at least 1 byte of text after the first token, got {num_bytes}")
    return stream_loss(model, ids, **options) / math.log(2) / num_bytes
