"""The recurrent state between calls."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class RecurrentCache(Cache):
    """The whole state of a recurrent model: a tuple of float32 tensors per layer, whatever the length of the past.

    Passed and returned as `cache`, or `past_key_values`. Tensors keep their shape and, where no gradient flows through
    them, their address, so that a compiled decoding step can be captured. A subclass of transformers' `Cache` in name
    and interface only: its layers hold keys and values.

    Attributes:
        states: per layer, the tuple of (B, ...) tensors, or None before the first token.
        seen_tokens: positions consumed so far, padding included.
        model_type: of the model whose state it is, or None before the first token.
    """

    is_compileable = False  # generate() would build attention masks for it
    is_croppable = False  # transformers' looks at layers of keys and values, and would find all of none croppable

    def __init__(self, num_layers: int):
        self.layers = []  # of keys and values: none
        self.states: list[tuple[Tensor, ...] | None] = [None] * num_layers
        self.seen_tokens = 0
        self.model_type: str | None = None

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        shapes = [None if state is None else tuple(tuple(x.shape) for x in state) for state in self.states]
        return f"RecurrentCache(seen_tokens={self.seen_tokens}, states={shapes})"

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, ...] | None:
        return self.states[layer_idx]

    @property
    def batch_size(self) -> int | None:
        """B, or None before the first token."""
        return None if self.states[0] is None else self.states[0][0].shape[0]

    @property
    def is_initialized(self) -> bool:
        return self.states[0] is not None

    @property
    def is_linear(self) -> list[bool]:
        """Not in transformers' sense, whose linear layers do not know how many tokens they have seen: from 5.24 on
        generate() reads the whole prompt again in front of a cache of such layers alone."""
        return [False] * len(self)

    def update(self, state: tuple[Tensor, ...], layer_idx: int) -> None:
        """Store a layer's new state: in place, unless autograd may still need the old one or track the new one."""
        old = self.states[layer_idx]
        both = (*state, *(old or ()))
        tracked = any(x.requires_grad for x in both)
        if not torch.compiler.is_compiling():
            tracked = tracked or any(x.is_inference() for x in both)  # such a tensor cannot be written to elsewhere
        if old is None or tracked or any(a.shape != b.shape for a, b in zip(old, state, strict=True)):
            self.states[layer_idx] = state
            return
        for a, b in zip(old, state, strict=True):
            a.copy_(b)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.is_initialized

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no maximum

    def reset(self) -> None:
        """Forget everything: the next token is the first."""
        self.states = [None] * len(self.states)
        self.seen_tokens = 0
        self.model_type = None

    def __deepcopy__(self, memo: dict) -> "RecurrentCache":
        """To go on from one state in several ways. Gradients flow through the copy as through this one."""
        memo[id(self)] = other = RecurrentCache(len(self))
        other.states = [None if state is None else tuple(x.clone() for x in state) for state in self.states]
        other.seen_tokens, other.model_type = self.seen_tokens, self.model_type
        return other

    def detach(self) -> "RecurrentCache":
        """Cut the graph, for backpropagation truncated in time; in place, returns itself."""
        self.states = [None if state is None else tuple(x.detach().clone() for x in state) for state in self.states]
        return self

    def _rows(self, select) -> None:
        self.states = [None if state is None else tuple(select(x) for x in state) for state in self.states]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("RecurrentCache: a recurrent state cannot be cropped; run the shorter prompt again")
