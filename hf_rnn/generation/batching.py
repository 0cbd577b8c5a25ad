"""Continuous batching: texts join and leave between steps, and long prompts are read beside texts that go on.

States lie in one buffer of rows: first those of texts that are decoded, then those of prompts that are read. A step is
a token of each of the former and a piece of the latter; both are slices of the buffer, which the model writes to where
they lie.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_rnn.skeleton.cache import RecurrentCache

# Greedy but for logits that are equal to rounding; a smaller one makes infinities of them
LEAST_TEMPERATURE = 1e-6


class Sampling(NamedTuple):
    """How a token is chosen: the most likely one, or, where `do_sample`, by chance, by transformers' processors of
    these names; None: without it. Temperatures below `LEAST_TEMPERATURE` are that one."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @lru_cache(maxsize=256)  # noqa: B019, of values, and not of ever more of them
    def processors(self) -> LogitsProcessorList:
        found = LogitsProcessorList()
        if self.temperature not in (None, 1.0):
            found.append(TemperatureLogitsWarper(max(float(self.temperature), LEAST_TEMPERATURE)))  # type: ignore[arg-type]
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p not in (None, 1.0):
            found.append(TopPLogitsWarper(float(self.top_p)))  # type: ignore[arg-type]
        if self.min_p is not None:
            found.append(MinPLogitsWarper(self.min_p))
        return found


GREEDY = Sampling()
READ_AT_ONCE = 8  # 512 prompts of 8 tokens in one step instead of eight


@dataclass(eq=False)
class Request:
    """A text that goes on. Its tokens do not depend on what is beside it.

    Args:
        unread: tokens to read next, the prompt at first: at least one.
        max_new_tokens: so many at most; 0: read alone.
        sampling: how tokens are chosen.
        eos_token_ids: the text ends with one of these, which counts as its last token.
        seed: of its chance; None: another one each time.
        state: what `unread` goes on from, one row, which stays as it is; None: the beginning of a text.
        logprobs: so many most likely tokens are kept with their logarithmic probabilities, by the model, before
            temperature and the like; 0: the chosen one's alone; None: none.

    Attributes:
        tokens: new ones.
        token_logprobs: of each.
        top_logprobs: of each the most likely ones, as pairs of token and logarithmic probability.
        read_tokens: since it has its row.
        finish_reason: "stop" behind an end token, "length", "cancelled", or an error; None: not yet.
        cancelled: may be set by any thread; the text ends with the next step.
    """

    unread: list[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    eos_token_ids: frozenset[int] = frozenset()
    seed: int | None = None
    state: RecurrentCache | None = None
    logprobs: int | None = None
    tokens: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    read_tokens: int = 0
    finish_reason: str | None = None
    cancelled: bool = False

    def __post_init__(self):
        if not self.unread:
            raise ValueError("unread: expected at least one token; a text of none begins with bos_token_id")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected at least 0, got {self.max_new_tokens}")
        self.unread = list(self.unread)
        self.random = numpy.random.default_rng(self.seed)
        self.read_in_step = 0  # the last one that has read a piece of its prompt


class ContinuousBatch:
    """Texts of one model, side by side. Belongs to one thread, which calls `step` as long as `busy`.

    Args:
        model: a causal language model of this package.
        max_rows: texts at once; others wait for their turn, in order. The buffer has so many states.
        prompt_tokens: tokens of prompts in one step, by which a step is longer for all: prompts that are longer are
            read in pieces. While no text is decoded, which would wait, `READ_AT_ONCE` times as many of several prompts.
    """

    def __init__(self, model: Any, max_rows: int = 64, prompt_tokens: int = 512):
        for name, value in (("max_rows", max_rows), ("prompt_tokens", prompt_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if model.training:
            raise ValueError("model: expected model.eval(); dropout would disturb every token")
        self.model, self.max_rows, self.prompt_tokens = model, max_rows, prompt_tokens
        self.initial = [layer.initial_states(1) for layer in model.model.layers]
        self.buffer = [tuple(x.detach().repeat_interleave(max_rows, 0) for x in state) for state in self.initial]
        self.rows: list[Request] = []  # the first `decoding` of them are decoded, the others read
        self.decoding = 0
        self.waiting: deque[Request] = deque()
        self._step = 0

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def add(self, request: Request) -> Request:
        """Let it have the next row that is free.

        Raises:
            IndexError, ValueError: tokens that the model does not know; the state of another model or of several rows.
        """
        size = self.model.config.vocab_size
        if wrong := [token for token in request.unread if not 0 <= token < size]:
            raise IndexError(f"unread: expected tokens in [0, {size}), got {wrong[0]}")
        if request.state is not None:
            self._check(request.state)
        request.finish_reason, request.cancelled = None, False
        self.waiting.append(request)
        return request

    def pause(self, request: Request) -> None:
        """Take a text from its row, or from those that wait; its `state` and `unread` are where it was. `add` lets it
        go on exactly there."""
        if request in self.rows:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def initial_state(self) -> RecurrentCache:
        """Of a text before its first token, one row."""
        cache = RecurrentCache(len(self.initial))
        cache.states = [tuple(x.detach().clone() for x in state) for state in self.initial]
        cache.model_type = self.model.config.model_type
        return cache

    def snapshot(self, request: Request) -> RecurrentCache:
        """A copy of the state of a text that has a row: behind all but its `unread`."""
        return self._snapshot(self.rows.index(request), request)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """A token of every text that is decoded and a piece of the prompts that are read.

        Returns:
            The texts that have a new token, or have ended.
        """
        ended = [r for r in (*self.rows, *self.waiting) if r.cancelled]
        for request in ended:
            self.pause(request)
            request.finish_reason = "cancelled"
        self._step += 1
        self._admit()
        moved = self._decode() + self._read()
        for request in moved:
            if request.finish_reason is None and len(request.tokens) >= request.max_new_tokens:
                request.finish_reason = "length"
            if request.finish_reason is not None:
                self._leave(request)
        return ended + moved

    def _admit(self) -> None:
        while self.waiting and len(self.rows) < self.max_rows:
            request, row = self.waiting.popleft(), len(self.rows)
            request.read_tokens, request.read_in_step = 0, self._step
            states = self.initial if request.state is None else request.state.states
            for mine, theirs in zip(self.buffer, states, strict=True):
                for x, y in zip(mine, theirs, strict=True):  # type: ignore[arg-type]
                    x[row] = y[0]
            self.rows.append(request)

    def _decode(self) -> list[Request]:
        """One token of each row in front."""
        requests = self.rows[: self.decoding]
        if not requests:
            return []
        ids = torch.tensor([request.unread for request in requests], device=self.model.device)
        for request in requests:
            request.read_tokens += 1
        self._take(requests, self._forward(ids, None, 0))
        return requests

    def _read(self) -> list[Request]:
        """A piece of the prompt that waits longest for one, and of those behind its row, as many as fit; those that are
        through are decoded."""
        if self.decoding == len(self.rows):
            return []
        waiting = range(self.decoding, len(self.rows))
        self._swap(self.decoding, min(waiting, key=lambda row: self.rows[row].read_in_step))
        reading = self.rows[self.decoding :]
        length = min(len(reading[0].unread), self.prompt_tokens)
        most = self.prompt_tokens if self.decoding else READ_AT_ONCE * self.prompt_tokens
        reading = reading[: max(most // length, 1)]
        pieces = [request.unread[:length] for request in reading]
        longest = max(map(len, pieces))
        ids = torch.tensor([[0] * (longest - len(piece)) + piece for piece in pieces], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(piece)) + [1] * len(piece) for piece in pieces], device=ids.device)
        logits = self._forward(ids, mask, self.decoding)
        through = [n for n, request in enumerate(reading) if len(request.unread) <= length]
        for request, piece in zip(reading, pieces, strict=True):
            request.read_tokens += len(piece)
            request.read_in_step = self._step
            request.unread = request.unread[length:]
        done = [reading[n] for n in through]
        for request in done:
            self._swap(self.rows.index(request), self.decoding)
            self.decoding += 1
        asked = [n for n in through if reading[n].max_new_tokens]
        if asked:
            self._take([reading[n] for n in asked], logits[asked])
        return done

    def _forward(self, ids: Tensor, mask: Tensor | None, first: int) -> Tensor:
        """Read tokens (B, T) into B rows from the `first` on; the last one's logits (B, V)."""
        rows = slice(first, first + len(ids))
        cache = RecurrentCache(len(self.buffer))
        cache.states = [tuple(x[rows] for x in state) for state in self.buffer]
        cache.model_type = self.model.config.model_type
        before = cache.states
        logits = self.model(ids, attention_mask=mask, cache=cache, logits_to_keep=1, use_cache=True).logits[:, -1]
        for old, new in zip(before, cache.states, strict=True):
            for x, y in zip(old, new, strict=True):  # type: ignore[arg-type]
                if x.data_ptr() != y.data_ptr():  # an op that has not written to where it lay
                    x.copy_(y)
        return logits

    def _take(self, requests: list[Request], logits: Tensor) -> None:
        """Choose each row's next token."""
        logits = logits.float()
        chosen = torch.empty(len(requests), dtype=torch.long, device=logits.device)
        groups: dict[Sampling, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(request.sampling, []).append(row)
        for sampling, rows in groups.items():
            part = logits if len(rows) == len(requests) else logits[rows]
            if not sampling.do_sample:
                chosen[rows] = part.argmax(-1)
                continue
            weights = sampling.processors()(None, part).softmax(-1).cumsum(-1)  # type: ignore[arg-type]
            chance = torch.tensor([[requests[row].random.random()] for row in rows], dtype=weights.dtype)
            chosen[rows] = torch.searchsorted(weights, chance.to(weights.device) * weights[:, -1:]).squeeze(1)
        finite = logits.amax(-1).isfinite()  # neither NaN nor infinite, and some token is possible
        for request, token, good in zip(requests, chosen.tolist(), finite.tolist(), strict=True):
            if not good:
                request.finish_reason = "error: the model gave no numbers for the next token"
                continue
            request.tokens.append(token)
            request.unread = [token]
            if token in request.eos_token_ids:
                request.finish_reason = "stop"
        asked = [row for row, r in enumerate(requests) if r.logprobs is not None and finite[row]]
        if asked:
            self._keep_logprobs([requests[row] for row in asked], logits[asked].log_softmax(-1), chosen[asked])

    def _keep_logprobs(self, requests: list[Request], logprobs: Tensor, chosen: Tensor) -> None:
        own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
        most = max(r.logprobs or 0 for r in requests)
        values, tokens = (x.tolist() for x in logprobs.topk(min(most, logprobs.shape[1]), -1))
        for request, value, row, ids in zip(requests, own, values, tokens, strict=True):
            request.token_logprobs.append(value)
            request.top_logprobs.append(list(zip(ids, row, strict=True))[: request.logprobs])

    def _leave(self, request: Request) -> None:
        """Free a row; the text takes its state along."""
        row = self.rows.index(request)
        request.state = self._snapshot(row, request)
        if row < self.decoding:  # the last one that is decoded takes its place, and the last one that is read takes its
            self.decoding -= 1
            self._swap(row, self.decoding)
            row = self.decoding
        self._swap(row, len(self.rows) - 1)
        self.rows.pop()

    def _snapshot(self, row: int, request: Request) -> RecurrentCache:
        before = 0 if request.state is None else request.state.seen_tokens
        cache = RecurrentCache(len(self.buffer))
        cache.states = [tuple(x[row : row + 1].clone() for x in state) for state in self.buffer]
        cache.model_type = self.model.config.model_type
        cache.advance_by(before + request.read_tokens, self.model.base_model)
        return cache

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]
        for state in self.buffer:
            for x in state:
                x[[a, b]] = x[[b, a]]

    def _check(self, state: RecurrentCache) -> None:
        own = [[tuple(x.shape) for x in tensors] for tensors in self.initial]
        given = [None if tensors is None else [tuple(x.shape) for x in tensors] for tensors in state.states]
        if state.model_type != self.model.config.model_type or given != own:
            raise ValueError(
                f"state: expected one row of a {self.model.config.model_type} with states {own}, got {given} of a "
                f"{state.model_type}"
            )


# What of a `GenerationConfig` a batch knows; anything else that says something is refused
_KNOWN = {"max_new_tokens", "max_length", "num_return_sequences", *Sampling._fields}
_KNOWN |= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"}
_SAME_AS_NONE = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beam_groups": 1}


def requests_of(config: Any, prompts: Sequence[Sequence[int]], seed: int | None) -> list[Request]:
    """Prompts as requests, `num_return_sequences` of each, by transformers' `GenerationConfig`.

    Raises:
        ValueError: a setting that a batch does not know, or no `max_new_tokens` nor `max_length`.
    """
    for name, value in config.to_diff_dict().items():
        if name not in _KNOWN and not name.startswith("_") and value not in (None, False, _SAME_AS_NONE.get(name)):
            raise ValueError(f"{name}: expected none of generate_batch, which knows {sorted(_KNOWN)}; got {value!r}")
    sampling = Sampling(*(getattr(config, name) for name in Sampling._fields))
    sampling = sampling if sampling.do_sample else GREEDY
    eos = config.eos_token_id
    ends = frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)
    found: list[Request] = []
    for prompt in prompts:
        most = config.max_new_tokens
        if most is None:
            if config.max_length is None:
                raise ValueError("max_new_tokens: expected how many tokens to generate")
            most = max(config.max_length - len(prompt), 0)
        for _ in range(config.num_return_sequences or 1):
            own = None if seed is None else seed + len(found)
            found.append(Request(list(prompt), most, sampling, ends, own, logprobs=0))
    return found
