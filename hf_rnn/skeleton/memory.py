"""The whole state of a recurrent model as one tensor: what Supervised Memory Training teaches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_rnn.skeleton.cache import RecurrentCache


class MemoryMixin:
    """`hf_rnn.MemoryProtocol`, what `SMTTrainer` and `DMTTrainer` ask of a causal language model, as those of this
    package answer it.

    A memory is (N, K, D) in float32 (float64 in a float64 model): every state tensor of every layer, whatever it is
    called there, as rows of D channels.
    """

    model: Any
    config: Any
    logits: Any

    @property
    def memory_shape(self) -> tuple[int, int]:
        """(K, D); no attribute of a model that memories cannot train (`check_memories` says why)."""
        try:
            return self.check_memories()
        except ValueError as error:
            raise AttributeError(str(error)) from error

    def check_memories(self) -> tuple[int, int]:
        """`memory_shape`.

        Raises:
            ValueError: a model that memories cannot train, with the reason.
        """
        for layer in self.model.layers:
            layer.mixer.to_states(tuple(torch.ones(1, *shape) for shape in layer.state_shapes))
        shapes = [shape for layer in self.model.layers for shape in layer.state_shapes]
        if any(layer.conv is not None for layer in self.model.layers):
            raise ValueError(
                "conv_kernel: expected 0 to train by memories: what a convolution adds to the output is in no state"
            )
        widths = sorted({shape[-1] for shape in shapes})
        if len(widths) > 1:
            raise ValueError(
                f"model: expected states of one width to train by memories, got {widths}; a "
                "convolution's is hidden_size: expansion_factor=1 (of an xLSTM inner_size=hidden_size) makes them one"
            )
        return sum(shape[0] if len(shape) > 1 else 1 for shape in shapes), widths[0]

    def initial_memory(self, batch_size: int) -> Tensor:
        """The memory before the first token, (N, K, D)."""
        return self._join([layer.mixer.initial_states(batch_size) for layer in self.model.layers])

    def update_memory(self, memory: Tensor, input_ids: Tensor) -> Tensor:
        """The memory after one more token: (N, K, D) and (N,) to (N, K, D)."""
        cache = RecurrentCache(len(self.model.layers))
        cache.states = [*self._split(memory.clone())]  # a cache is written to
        self.model(input_ids[:, None], cache=cache, use_cache=True)
        return self._join(cache.states)

    def update_memories(self, memory: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The memories after each of several more tokens, in one pass: (N, K, D) and (N, T) to (N, T, K, D). Where the
        mask (N, T) is False nothing is read, and the memory stays."""
        if input_ids.shape[1] == 0:
            return memory[:, None].expand(-1, 0, -1, -1)
        cache = RecurrentCache(len(self.model.layers))
        cache.states = [*self._split(memory.clone())]
        cache.activate_past_recording()
        self.model(input_ids, None if mask is None else mask.long(), cache=cache, use_cache=True)
        if input_ids.shape[1] == 1:
            return self._join(cache.states)[:, None]
        assert cache.past is not None
        _, states = cache.past.parts[-1]
        after = self._join([tuple(x.flatten(0, 1) for x in layer or ()) for layer in states])
        return after.unflatten(0, input_ids.shape)

    def read_memory(self, memory: Tensor, input_ids: Tensor) -> Tensor:
        """Next-token logits: (N, K, D) and the token taken in last, (N,), to (N, V).

        `MemoryRNN` needs no token; where there is a residual stream, it carries the token to the output.
        """
        x = self.model.embed_tokens(input_ids[:, None])
        for layer, state in zip(self.model.layers, self._split(memory[:, None]), strict=True):
            x = layer.read(x, state)
        return self.logits(self.model.norm(x))[:, 0]

    def to_memory(self, tokens: Tensor) -> Tensor:
        """Vectors of length sqrt(D), (N, K, D), as a memory that the model itself could hold, differentiably."""
        states = self._split(tokens)
        return self._join([layer.mixer.to_states(s) for layer, s in zip(self.model.layers, states, strict=True)])

    def _split(self, memory: Tensor) -> list[tuple[Tensor, ...]]:
        """(N, ..., K, D) to the states of the layers."""
        rows, at = [], 0
        for layer in self.model.layers:
            states = []
            for shape in layer.state_shapes:
                size = shape[0] if len(shape) > 1 else 1
                state = memory[..., at : at + size, :]
                states.append(state if len(shape) > 1 else state.squeeze(-2))
                at += size
            rows.append(tuple(states))
        return rows

    def _join(self, states: Sequence[Any]) -> Tensor:
        shapes = [shape for layer in self.model.layers for shape in layer.state_shapes]
        flat = [state for layer in states for state in layer]
        return torch.cat([s if len(shape) > 1 else s[:, None] for s, shape in zip(flat, shapes, strict=True)], 1)
