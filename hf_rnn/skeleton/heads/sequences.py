"""The sequences of a batch: which of their tokens are real, and one vector of each."""

from typing import Any

import torch
from torch import Tensor

from hf_rnn.layers.continuous_input import real_patches
from hf_rnn_kernels.checks import values_known


def mean_pooling(last_hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The mean over real tokens: (B, T, D) to (B, D). The sum is in float32, or float64 where that is given.

    Args:
        attention_mask: (B, T), zeros at padding; None: all tokens are real.

    Raises:
        ValueError: a mask of another shape, or a row of padding only.
    """
    x = last_hidden_state
    if attention_mask is not None and attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask: expected shape (B, T) = {tuple(x.shape[:2])}, got {tuple(attention_mask.shape)}"
        )
    real = torch.ones_like(x[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    check_rows(real)
    total = x.masked_fill(~real[..., None], 0.0).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / real.sum(1, keepdim=True)).to(x.dtype)


def real_tokens(x: Tensor, attention_mask: Tensor | None, input_features: Tensor | None, config: Any) -> Tensor:
    """(B, T) bool, of the tokens x (B, T, D) that forward made of its inputs: False at padding."""
    if attention_mask is None:
        return torch.ones_like(x[..., 0], dtype=torch.bool)
    if input_features is None:
        return attention_mask[:, attention_mask.shape[1] - x.shape[1] :].bool()
    steps = attention_mask[:, attention_mask.shape[1] - input_features.shape[1] :].bool()
    return real_patches(steps, config.patch_size)


def refuse_packing(inputs: dict[str, Any]) -> None:
    """Raise ValueError for packed sequences, by name."""
    packing = [name for name in ("cu_seq_lens_q", "seq_idx", "position_ids") if inputs.get(name) is not None]
    if packing:
        raise ValueError(f"{packing[0]}: expected one sequence a row; pad instead of packing")


def pool(x: Tensor, real: Tensor, pooling: str) -> Tensor:
    """`config.classifier_pooling` of x (B, T, D) over the tokens that are `real` (B, T): (B, D), of "ends" (B, 2 D)."""
    check_rows(real)
    if pooling == "mean":
        return mean_pooling(x, real)
    rows = torch.arange(x.shape[0], device=x.device)
    last = x[rows, (real * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)]
    return last if pooling == "last" else torch.cat([x[rows, real.int().argmax(1)], last], -1)


def check_rows(real: Tensor) -> None:
    """Raise ValueError for a row without a real token, where values are known."""
    if not real.shape[1]:
        raise ValueError(f"inputs: expected a token at least in every row, got (B, T) = {tuple(real.shape)}")
    if values_known(real) and not bool(real.any(1).all()):
        raise ValueError("attention_mask: expected a real token in every row, got a row of padding only")
