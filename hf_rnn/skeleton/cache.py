"""The recurrent state between calls."""

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_rnn.skeleton.recording import LayerStates, Recording, one_of
from hf_rnn.skeleton.state_file import fingerprint, read_state, write_state
from hf_rnn_kernels.transforms import transforming


class RecurrentCache(Cache):
    """The whole state of a recurrent model: a tuple of float32 tensors per layer, whatever the length of the past.

    Passed and returned as `cache`, or `past_key_values`. A forward pass takes the state over: under `torch.no_grad()`
    it writes to the tensors, which keep their shape and address, so that a compiled decoding step can be captured; with
    gradients enabled it puts new ones in their place. To go on from one state in several ways, copy it (`clone`). A
    state belongs to one thread at a time; several threads may use one model. A subclass of transformers' `Cache` in
    name and interface only: its layers hold keys and values.

    Attributes:
        states: per layer, the tuple of (B, ...) tensors, or None before the first token.
        seen_tokens: positions consumed so far, padding included: so many `input_ids` of a whole text and its mask lie
            behind. 0 makes the text that follows one of its own to `generate()`, which then needs no more of the past
            than the state.
        model_type: of the model whose state it is, or None before the first token.
        ends_inside_patch: the last steps filled no patch (`config.patch_size`), so that none can follow.
        beside: tensors (B, ...) by name that go with the state, the last logits for example, until the next token is
            read.
        past: while it records, states before the last tokens, else None.
    """

    is_compileable = False  # generate() would build attention masks for it

    def __init__(self, num_layers: int):
        self.layers = []  # of keys and values: none
        self.states: LayerStates = [None] * num_layers
        self.seen_tokens = 0
        self.model_type: str | None = None
        self.ends_inside_patch = False
        self.beside: dict[str, Tensor] = {}
        self.past: Recording | None = None
        self._reader: weakref.ref | None = None  # the backbone that has read the last token

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
    def nbytes(self) -> int:
        """Memory of the states, without what is recorded."""
        return sum(x.nbytes for state in self.states if state is not None for x in state)

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

    def advance_by(self, tokens: int, reader: Any) -> None:
        """So many positions have been read, by this backbone."""
        self.seen_tokens += tokens
        self.beside = {}
        if not torch.compiler.is_compiling():
            self._reader = weakref.ref(reader)

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
        self.beside = {}
        self.past = None if self.past is None else Recording(self.past.reach)

    # Copies, rows and files

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put another tensor in the place of each."""

        def changed(states):
            return [None if state is None else tuple(change(x) for x in state) for state in states]

        self.states = changed(self.states)
        self.beside = {name: change(x) for name, x in self.beside.items()}
        self.past = None if self.past is None else self.past.changed(changed)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "RecurrentCache":
        other = copy.copy(self)
        other._reader = self._reader
        other._each(change)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_reader": None}  # processes share no models

    def __deepcopy__(self, memo: dict) -> "RecurrentCache":
        memo[id(self)] = other = self.clone()
        return other

    def clone(self) -> "RecurrentCache":
        """To go on from one state in several ways. Gradients flow through the copy as through this one."""
        return self._with(torch.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "RecurrentCache":
        """A copy there, floating tensors in that dtype. In bfloat16 or float16 it takes half the room: each token still
        computes in float32, and what it leaves is rounded."""

        def moved(x):
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None, copy=True)

        return self._with(moved)

    def select(self, rows: Sequence[int] | Tensor) -> "RecurrentCache":
        """These rows, in this order, as a new state.

        Raises:
            ValueError: a state before its first token, which has no rows.
            IndexError: no such row.
        """
        if self.batch_size is None:
            raise ValueError("state: nothing is read yet, and there are no rows")
        index = torch.as_tensor(rows, dtype=torch.long)
        if bool(((index < 0) | (index >= self.batch_size)).any()):
            raise IndexError(f"rows: expected numbers in [0, {self.batch_size}), got {index.tolist()}")
        return self._with(lambda x: x.index_select(0, index.to(x.device)))

    @classmethod
    def stack(cls, caches: Sequence["RecurrentCache"]) -> "RecurrentCache":
        """The rows of several states, one below the other, as a new state that goes on with all of them together.

        `seen_tokens` is the largest: the shorter texts count as padded on the left up to it, and padding changes no
        state.

        Raises:
            ValueError: no states, states of different models, layers, dtypes or devices, or before their first token.
        """
        if not caches:
            raise ValueError("caches: expected at least one state")
        first = caches[0]
        for n, cache in enumerate(caches):
            if None in cache.states:
                raise ValueError(f"caches: number {n} is before its first token, when a state has no rows yet")
            kinds = [(c.model_type, c.ends_inside_patch, *c._kinds()) for c in (first, cache)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"caches: expected states of one model, got {kinds[0]} and, number {n}, {kinds[1]}")
        other = cls(len(first))
        other.seen_tokens = max(cache.seen_tokens for cache in caches)
        other.model_type, other.ends_inside_patch = first.model_type, first.ends_inside_patch
        other._reader = first._reader
        layers = zip(*(cache.states for cache in caches), strict=True)
        other.states = [tuple(torch.cat(rows) for rows in zip(*layer, strict=True)) for layer in layers]
        for name in set.intersection(*(set(cache.beside) for cache in caches)):
            other.beside[name] = torch.cat([cache.beside[name] for cache in caches])
        return other

    def _kinds(self) -> list[tuple]:
        """Shape without rows, dtype and device of each tensor."""
        return [(tuple(x.shape[1:]), x.dtype, x.device) for state in self.states for x in state or ()]

    def save(self, file: str | Path, model: Any = None) -> None:
        """Write the state to a file, with `seen_tokens`, what lies `beside`, and the model's type and fingerprint, by
        which `load` knows whose it is. The file is there whole or not at all; what is recorded is not in it.

        Args:
            model: whose state it is, with any head. Default: the one that has read the last token.

        Raises:
            ValueError: a state before its first token; or no model is known, as after `torch.compile` or unpickling.
        """
        backbone = model.base_model if model is not None else self._reader and self._reader()
        if None in self.states or backbone is None:
            raise ValueError(
                "state: nothing is read yet" if None in self.states else "model: not known, pass the one that reads it"
            )
        metadata = dict(model_type=self.model_type, fingerprint=fingerprint(backbone), layers=len(self))
        metadata |= dict(seen_tokens=self.seen_tokens, ends_inside_patch=int(self.ends_inside_patch))
        states = [state or () for state in self.states]
        write_state(file, states, self.beside, {name: str(value) for name, value in metadata.items()})

    @classmethod
    def load(cls, file: str | Path, model: Any = None) -> "RecurrentCache":
        """A state from `save`, on the model's device, or the CPU.

        Args:
            model: the one to go on with, whose fingerprint must be the saved one's. None: nothing is compared until
                the state meets a model, which looks at type and shapes.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is no state, cut off or damaged; the state of another model.
        """
        layers, beside, metadata = read_state(file)
        cache = cls(len(layers))
        cache.states, cache.beside = [*layers], beside
        cache.model_type, cache.seen_tokens = metadata["model_type"], int(metadata["seen_tokens"])
        cache.ends_inside_patch = metadata["ends_inside_patch"] == "1"
        if model is None:
            return cache
        backbone = model.base_model
        if cache.model_type != backbone.config.model_type:
            raise ValueError(
                f"{file}: the state of another model, a {cache.model_type}; expected one of a "
                f"{backbone.config.model_type}"
            )
        if metadata["fingerprint"] != fingerprint(backbone):
            raise ValueError(f"{file}: the state of another {cache.model_type}, with other settings or weights")
        cache._each(lambda x: x.to(backbone.device))
        cache._reader = weakref.ref(backbone)
        return cache

    def detach(self) -> "RecurrentCache":
        """Cut the graph, for backpropagation truncated in time; in place, returns itself."""
        self._each(lambda x: x.detach().clone())
        return self

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    # Recording, to take tokens back

    @property
    def is_croppable(self) -> bool:
        return self.past is not None

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self.past is not None

    def activate_past_recording(self, tokens: int = 0) -> None:
        """From here on keep the states before each token whose logits are asked for (`logits_to_keep`; of a backbone
        alone, each token).

        Args:
            tokens: at least the last so many can be taken back at any time, one after another, too. 0: those since
                the last `crop`, as `generate()` wants it, which crops after each pass while it decodes with candidates.
        """
        if self.past is None or self.past.reach != tokens:
            self.past = Recording(tokens)

    def stop_past_recording(self) -> None:
        self.past = None

    def record(self, tokens: int, wanted: int = 0) -> int:
        """To be called before `tokens` are read, of which the last `wanted` may be taken back, 0 for all. Returns after
        how many of the last tokens `record_each` wants the states: 0 where this one, kept here, is all."""
        if self.past is None or not tokens:
            return 0
        wanted = min(wanted or tokens, tokens)
        if wanted == tokens:
            states = [None if state is None else tuple(x.clone()[:, None] for x in state) for state in self.states]
            self.past.add(self.seen_tokens, states)
        return 0 if tokens == 1 else min(wanted + 1, tokens)

    def record_each(self, tokens: int) -> None:
        """Take what the layers gave, states after each of the last so many tokens (B, tokens, ...), apart."""
        assert self.past is not None
        last = one_of(self.states, -1)
        self.past.add(self.seen_tokens - tokens + 1, self.states)
        self.states = last

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, of those that are recorded, and forget them, and all that is recorded unless so
        many can be taken back at any time.

        Args:
            tokens_to_remove: how many; transformers writes them as negative numbers.

        Raises:
            ValueError: the state before these tokens is not recorded.
        """
        count = abs(tokens_to_remove)
        if count:
            target = self.seen_tokens - count
            found = None if self.past is None else self.past.at(target)
            if found is None:
                raise ValueError(
                    f"tokens_to_remove: the state before the last {count} tokens is not recorded; expected "
                    "activate_past_recording() before they are read, and tokens read since the last crop"
                )
            self.states, self.seen_tokens = found, target
            self.beside = {}
        if self.past is not None:
            self.past.cut(self.seen_tokens)
