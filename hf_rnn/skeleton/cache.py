"""The recurrent state between calls."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_rnn_kernels.transforms import transforming


class RecurrentCache(Cache):
    """The whole state of a recurrent model: a tuple of float32 tensors per layer, whatever the length of the past.

    Passed and returned as `cache`, or `past_key_values`. A forward pass takes the state over: under `torch.no_grad()`
    it writes to the tensors, which keep their shape and address, so that a compiled decoding step can be captured; with
    gradients enabled it puts new ones in their place. To go on from one state in several ways, copy it
    (`copy.deepcopy`). A state belongs to one thread at a time; several threads may use one model. A subclass of
    transformers' `Cache` in name and interface only: its layers hold keys and values.

    Attributes:
        states: per layer, the tuple of (B, ...) tensors, or None before the first token.
        seen_tokens: positions consumed so far, padding included.
        model_type: of the model whose state it is, or None before the first token.
        ends_inside_patch: the last steps filled no patch (`config.patch_size`), so that none can follow.
    """

    is_compileable = False  # generate() would build attention masks for it
    is_croppable = False  # transformers' looks at layers of keys and values, and would find all of none croppable

    def __init__(self, num_layers: int):
        self.layers = []  # of keys and values: none
        self.states: list[tuple[Tensor, ...] | None] = [None] * num_layers
        self.seen_tokens = 0
        self.model_type: str | None = None
        self.ends_inside_patch = False

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

    @property
    def is_writable(self) -> bool:
        """Whether the state may be written over: there is one, autograd needs neither it nor what comes after it, and
        tensors of inference mode are met in inference mode. torch.export wants results, not writes."""
        if None in self.states or torch.is_grad_enabled() or torch.compiler.is_exporting() or transforming():
            return False
        tensors = [x for state in self.states for x in state]  # type: ignore[union-attr]
        if any(x.requires_grad for x in tensors):  # of a graph that may yet be walked back
            return False
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return True
        return not any(x.is_inference() for x in tensors)

    def update(self, state: tuple[Tensor, ...], layer_idx: int) -> None:
        """Keep a layer's state after a forward pass. Where `is_writable`, it is the old one, which the ops have written
        to: nothing is copied."""
        self.states[layer_idx] = state

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
        self.ends_inside_patch = False

    def __deepcopy__(self, memo: dict) -> "RecurrentCache":
        """To go on from one state in several ways. Gradients flow through the copy as through this one."""
        memo[id(self)] = other = RecurrentCache(len(self))
        other.states = [None if state is None else tuple(x.clone() for x in state) for state in self.states]
        other.seen_tokens, other.model_type = self.seen_tokens, self.model_type
        other.ends_inside_patch = self.ends_inside_patch
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
