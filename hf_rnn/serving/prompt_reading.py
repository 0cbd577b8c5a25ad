"""Prompts on their way into the batch: what several begin with is read once."""

import numpy as np
import torch

from hf_rnn.generation.batching import ContinuousBatch, Request
from hf_rnn.generation.prompt_cache import PromptCache
from hf_rnn.serving.choice import Choice

SHORT = 64  # tokens of a prompt that costs less to read than to look up and keep


class PromptReading:
    """A prompt, and the texts that go on from it. It is read up to where it parts from an earlier prompt of the same
    owner's, then up to its last token; with that the texts begin.

    Args:
        choices: with one prompt.
        owner: whose prompts it may share: who shares them could tell by the time what others have asked.
        prompts: the cache.
    """

    def __init__(self, choices: list[Choice], owner: str, prompts: PromptCache):
        first = choices[0].request
        self.choices, self.prompts = choices, prompts
        self.ids, self.state, self.position = first.unread, first.state, 0
        self.keeps = first.state is None and len(self.ids) >= SHORT and prompts.max_bytes > 0
        self.stops = [len(self.ids) - 1] if self.keeps or len(choices) > 1 else []
        self.request: Request | None = None  # what is being read
        if self.keeps:
            self.marked = np.array([-1 - int(owner[:15], 16), *self.ids])
            state, found, shared = prompts.find(self.marked[:-1])
            self.state, self.position = state, max(found - 1, 0)
            self.stops.append(shared - 1)
        self.kept = self.position
        for choice in choices:
            choice.remembered = self.position

    def read(self, batch: ContinuousBatch) -> Request | None:
        """The next part; None: the texts may begin, from `state` with what is unread."""
        stop = min((stop for stop in self.stops if stop > self.position), default=None)
        self.request = None if stop is None else Request(self.ids[self.position : stop], 0, state=self.state)
        return None if self.request is None else batch.add(self.request)

    def keep(self, batch: ContinuousBatch) -> None:
        """Within a part: its state every so many tokens."""
        assert self.request is not None
        at = self.position + self.request.read_tokens
        if self.keeps and at - self.kept >= self.prompts.every and self.request in batch.rows:
            self._put(at, batch.snapshot(self.request))

    def end(self) -> None:
        """Of a part."""
        assert self.request is not None
        self.position += self.request.read_tokens
        self.state = self.request.state
        if self.keeps:
            self._put(self.position, self.state)

    def _put(self, at: int, state) -> None:
        self.kept = at
        self.prompts.put(torch.from_numpy(self.marked[None, : at + 1]), state)
