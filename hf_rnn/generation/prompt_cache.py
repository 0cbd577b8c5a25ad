"""States of prompts that were read before, found by their beginnings."""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_rnn.skeleton.cache import RecurrentCache
from hf_rnn.skeleton.state_file import weights_now


class PromptNode:
    """A text in the trie: its parent's, and `tokens` more; and the state after it, where it is kept."""

    def __init__(self, tokens: np.ndarray, parent: "PromptNode | None" = None):
        self.tokens = tokens
        self.parent = parent
        self.children: dict[int, PromptNode] = {}
        self.state: RecurrentCache | None = None


class PromptCache:
    """A trie of states over the beginnings of prompts, so that what several prompts begin with is read once:

        prompts = PromptCache(model)
        model.generate(ids, cache=prompts.read(ids))

    A state is kept after every so many tokens of a prompt, at its end, and where it parts from an earlier one. The
    tokens are those of reading the whole prompt, to rounding (about 1e-6 of a logit): pieces are read, as
    `prefill_chunk_size` reads them. One thread at a time.

    Args:
        model: a causal language model of this package; where its weights change, all is forgotten.
        max_bytes: of states and tokens; what was not used for longest goes first. A state of a million parameters
            takes 11 to 38 KB: the default keeps some thousands.
        every: tokens between states within a prompt. A prompt that parts from another one for the first time is read
            again from the last of these on, up to `every` - 1 tokens. The first reading in pieces of 512 takes about
            1.3 times as long as at once, in smaller ones longer (docs/states.md).

    Attributes:
        nbytes: in use.
    """

    def __init__(self, model: Any, max_bytes: int = 64 * 2**20, every: int = 512):
        if max_bytes < 0 or every < 1:
            raise ValueError(f"max_bytes, every: expected at least 0 and 1, got {max_bytes} and {every}")
        self.model, self.max_bytes, self.every = model, max_bytes, every
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.root, self.nbytes = PromptNode(np.empty(0, np.int64)), 0
        self._recent: OrderedDict[PromptNode, None] = OrderedDict()  # nodes with a state, the last used last
        self._weights = weights_now(self.model.base_model)

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> RecurrentCache:
        """The state after all but the last token of each prompt, which `generate()` goes on from; a copy, its owner's.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), zeros at padding; the last token of each row is real.

        Raises:
            ValueError: another shape, or padding at the end.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if (
            input_ids.dim() != 2
            or not input_ids.shape[1]
            or mask.shape != input_ids.shape
            or not bool(mask[:, -1].all())
        ):
            raise ValueError(
                "input_ids, attention_mask: expected (B, T) of at least one token, padded on the left alone, got "
                f"{tuple(input_ids.shape)} and {tuple(mask.shape)}"
            )
        now = weights_now(self.model.base_model)
        if len(now) != len(self._weights) or any(
            a is not b or was != of for (a, *was), (b, *of) in zip(now, self._weights, strict=True)
        ):
            self.clear()
        rows = [self._read(ids[real.bool()][:-1].cpu().numpy()) for ids, real in zip(input_ids, mask, strict=True)]
        state = RecurrentCache.stack(rows) if len(rows) > 1 else rows[0]
        state.seen_tokens = input_ids.shape[1] - 1
        return state

    def find(self, tokens: np.ndarray) -> tuple[RecurrentCache | None, int, int]:
        """For who reads by itself: the state after the longest beginning of a text (T,) that has one, a copy, or None;
        that beginning's length; and how many of its tokens another text begins with, after which a state is worth
        keeping."""
        node, length, shared = self._longest(tokens)
        if node is None or node.state is None:
            return None, 0, shared
        self._recent.move_to_end(node)
        return node.state.clone(), length, shared

    def put(self, input_ids: Tensor, state: RecurrentCache) -> None:
        """Keep a copy of the state after a text of one row, (1, T): of a prompt and its answer, for the next turn."""
        if input_ids.shape[0] != 1 or state.batch_size != 1:
            raise ValueError(f"input_ids, state: expected one row, got {input_ids.shape[0]} and {state.batch_size}")
        self._put(input_ids[0].cpu().numpy(), state)

    def _read(self, tokens: np.ndarray) -> RecurrentCache:
        state, start, shared = self.find(tokens)
        if state is None:
            backbone = self.model.base_model
            state = RecurrentCache(len(backbone.layers))
            state.states = [layer.initial_states(1) for layer in backbone.layers]
            state.model_type = backbone.config.model_type
        inner = range(start // self.every * self.every + self.every, len(tokens), self.every)
        for stop in sorted({*inner, shared, len(tokens)} - set(range(start + 1))):
            ids = torch.from_numpy(tokens[start:stop])[None].to(self.model.device)
            self.model.base_model(ids, cache=state, use_cache=True)
            self._put(tokens[:stop], state)
            start = stop
        return state

    def _longest(self, tokens: np.ndarray) -> tuple[PromptNode | None, int, int]:
        """The longest text with a state that the tokens begin with, its length, and how many of them any text has."""
        node, at, found = self.root, 0, (None, 0)
        while (child := node.children.get(int(tokens[at])) if at < len(tokens) else None) is not None:
            same = common(child.tokens, tokens[at:])
            at += same
            if same < len(child.tokens):
                break
            node = child
            found = (node, at) if node.state is not None else found  # type: ignore[assignment]
        return *found, at

    def _put(self, tokens: np.ndarray, state: RecurrentCache) -> None:
        node = self._node(tokens)
        if node.state is None:
            node.state = state.clone()
            self.nbytes += node.state.nbytes
        self._recent[node] = None
        self._recent.move_to_end(node)
        while self.nbytes > self.max_bytes and self._recent:
            self._drop(self._recent.popitem(last=False)[0])

    def _node(self, tokens: np.ndarray) -> PromptNode:
        """The text's, made where there is none."""
        node, at = self.root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                child = node.children[int(tokens[at])] = PromptNode(tokens[at:].copy(), node)
                self.nbytes += child.tokens.nbytes
            elif (same := common(child.tokens, tokens[at:])) < len(child.tokens):
                upper = node.children[int(tokens[at])] = PromptNode(child.tokens[:same].copy(), node)
                child.tokens, child.parent = child.tokens[same:].copy(), upper
                upper.children[int(child.tokens[0])] = child
                child = upper
            node, at = child, at + len(child.tokens)
        return node

    def _drop(self, node: PromptNode) -> None:
        """A state, and the texts that lead to none."""
        assert node.state is not None
        self.nbytes -= node.state.nbytes
        node.state = None
        while node.parent is not None and node.state is None and not node.children:
            self.nbytes -= node.tokens.nbytes
            del node.parent.children[int(node.tokens[0])]
            node = node.parent


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many numbers both begin with."""
    n = min(len(a), len(b))
    other = a[:n] != b[:n]
    return int(other.argmax()) if other.any() else n
