"""Checks of what users pass to forward, and what padding and packing arguments mean for a recurrence."""

from typing import Any

import torch
from torch import Tensor

from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn_kernels.checks import values_known
from hf_rnn_kernels.layout import check_offsets

_OTHER_VALUES = (
    "attention_mask: expected zeros at padding and ones elsewhere, got other values; sequences packed into a row are "
    "told apart by position_ids, seq_idx or cu_seq_lens_q"
)
# What transformers, its collators and PEFT pass to any model and what means nothing for a recurrent one: there are no
# attentions, keys nor segments. `return_dict` and `output_hidden_states` are seen to by decorators around forward.
IGNORED = {"cache_position", "cu_seq_lens_k", "max_length_k", "max_length_q", "output_attentions", "token_type_ids"}
IGNORED |= {"output_hidden_states", "return_dict"}


def check_known(kwargs: dict, *known: str) -> None:
    """Raise TypeError for an argument of forward that is neither `known` nor `IGNORED`.

    An argument that is None is none: wrappers pass on what they have no value for.
    """
    for name in kwargs.keys() - IGNORED - set(known):
        if kwargs[name] is not None:
            raise TypeError(f"{name}: no argument of forward; expected one that its docstring names")


def state_of(cache: RecurrentCache | None, past_key_values: RecurrentCache | None) -> RecurrentCache | None:
    """The one state that came under either of its names."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache, past_key_values: two names of one argument; pass one of them")
    return past_key_values if cache is None else cache


def check_are_tensors(**given: Any) -> None:
    """Raise TypeError for lists, arrays and whatever else is neither a tensor nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}; torch.as_tensor makes one")


def check_inputs(num_input_features: int | None, **given: Tensor | None) -> None:
    """Raise unless forward got exactly one of the inputs that the model reads, as a tensor."""
    check_are_tensors(**given)
    wrong, right = "input_features", "input_ids"
    if num_input_features is not None:
        wrong, right = right, wrong
    if given[wrong] is not None:
        raise ValueError(
            f"{wrong}: this model reads {right} or inputs_embeds, its config.num_input_features is {num_input_features}"
        )
    if (given[right] is None) == (given["inputs_embeds"] is None):
        raise ValueError(f"{right}, inputs_embeds: pass exactly one of the two")
    if given["observed_mask"] is not None and given["input_features"] is None:
        raise ValueError("observed_mask: expected with input_features alone")


def check_reads_tokens(config: Any) -> None:
    """Raise ValueError for a language model that would not read what it predicts."""
    if config.num_input_features is not None:
        raise ValueError(
            "num_input_features: a language model predicts the tokens that it reads; expected None, got "
            f"{config.num_input_features}"
        )


def check_ids(
    name: str, ids: Tensor, vocab_size: int, ignore_index: int | None = None, setting: str = "vocab_size"
) -> None:
    """Raise IndexError for ids outside the vocabulary, or whatever the config's `setting` counts.

    Only on a CPU, where reading the values does not stall the device, and where they are known; elsewhere the
    embedding's own assertion speaks.
    """
    check_are_tensors(**{name: ids})
    if ids.dtype not in (torch.int32, torch.int64):
        kind = "token ids" if setting == "vocab_size" else "classes"
        raise TypeError(f"{name}: expected integer {kind} (int64 or int32), got {ids.dtype}")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    extremes = torch.aminmax(ids)
    if not values_known(extremes.min):  # the result, for FakeTensorMode makes fake ones of real ids, too
        return
    low, high = int(extremes.min), int(extremes.max)
    if ignore_index is not None and low == ignore_index:
        low = int(ids[ids != ignore_index].min()) if high != ignore_index else 0
        high = max(high, 0)
    if low < 0 or high >= vocab_size:
        raise IndexError(
            f"{name}: expected ids in [0, {vocab_size}) (config.{setting}), got {low if low < 0 else high}"
        )


def padding_mask(attention_mask: Tensor | None, batch: int, time: int, past: int) -> Tensor | None:
    """(B, T) bool mask of the current tokens, False at padding; None where there is none.

    transformers' `create_recurrent_attention_mask` does the same but drops the mask of single tokens, with which a
    padded sequence fed token by token would differ from one fed whole.
    """
    if attention_mask is None:
        return None
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch
    if not fits or (attention_mask.shape[1] != time and attention_mask.shape[1] != past + time):
        raise ValueError(
            f"attention_mask: expected shape (B, T) = {(batch, time)} or, with the past in front, "
            f"{(batch, past + time)}, got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - time :].bool()
    valid = (attention_mask == attention_mask.bool()).all()
    if torch.compiler.is_compiling():
        torch._assert_async(valid, _OTHER_VALUES)  # spoken by the device, which nobody waits for
        return mask
    if not values_known(mask):
        return mask
    valid, real = torch.stack([valid, mask.all()]).tolist()  # the device is waited for once
    if not valid:
        raise ValueError(_OTHER_VALUES)
    return None if real else mask


def packed_offsets(
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
    mask: Tensor | None,
    batch: int,
    time: int,
    goes_on: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Offsets (N + 1) of the sequences in the B * T tokens, and (B,) whether the first of a row goes on from a state;
    None and None where each row is one sequence, which does.

    A row holds several where a real token (`mask`) with position 0, or with another seq_idx, follows a real token. With
    a state (`goes_on`) one starts where the first real token has position 0 as well.

    Raises:
        ValueError: other shapes; offsets or numbers of sequences with a state, of which they do not say whether it is
            the first one's.
    """
    if goes_on and (cu_seq_lens is not None or (seq_idx is not None and position_ids is None)):
        raise ValueError(
            "cache: seq_idx and cu_seq_lens_q do not say whether the first sequence goes on from the state; pass "
            "position_ids, which are 0 where one starts"
        )
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q: packed sequences lie in a batch of one, got a batch of {batch}")
        check_offsets("cu_seq_lens_q", cu_seq_lens, time)
        return cu_seq_lens, cu_seq_lens.new_zeros(1, dtype=torch.bool)
    if position_ids is not None:
        starts = _per_token("position_ids", position_ids, batch, time) == 0
    elif seq_idx is not None:
        seq_idx = _per_token("seq_idx", seq_idx, batch, time)
        starts = seq_idx != seq_idx.roll(1, dims=1)
    else:
        return None, None
    real = torch.ones_like(starts) if mask is None else mask
    starts, count = starts & real, real.cumsum(1)
    if not bool((starts & (count > (0 if goes_on else 1))).any()):
        return None, None
    continues = ~(starts & (count == 1)).any(1)
    starts[:, :1] = True
    first = starts.reshape(-1).nonzero().squeeze(1)
    return torch.cat([first, first.new_tensor([batch * time])]), continues


def _per_token(name: str, x: Tensor, batch: int, time: int) -> Tensor:
    if x.dim() != 2 or x.shape[0] not in (1, batch) or x.shape[1] != time:
        raise ValueError(f"{name}: expected shape (B, T) = {(batch, time)} or (1, T), got {tuple(x.shape)}")
    return x.expand(batch, time)
