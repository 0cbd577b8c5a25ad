"""A text on its way from the batch to a client."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hf_rnn.generation.batching import ContinuousBatch, Request
from hf_rnn.serving.text import TextOut, Texts
from hf_rnn.skeleton.cache import RecurrentCache


class Token(NamedTuple):
    """A new token, its logarithmic probability, and the most likely ones with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int  # characters of the text before it


class Ending(NamedTuple):
    """Why a text ended, and the state behind all of it that was shown: `unread` is still to be read."""

    reason: str
    state: RecurrentCache | None
    unread: list[int]


class Piece(NamedTuple):
    """What is to be shown next of a text, its `number` among those of the request, with its tokens where their
    probabilities are asked for; behind the last one, `ending`."""

    number: int
    text: str
    tokens: list[Token]
    ending: Ending | None = None


class Choice:
    """All but its making belongs to the model's thread.

    Args:
        number: among those of one request.
        request: of the batch.
        texts: of the model's tokenizer.
        stop: strings with which it ends.
        keeps_state: whether somebody goes on from its ending, which is then in front of a stop string.
        send: takes each piece, in asyncio's thread.

    Attributes:
        remembered: tokens of its prompt that were not read for it, since an earlier one began alike.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        texts: Texts,
        stop: Sequence[str],
        keeps_state: bool,
        send: Callable[[Piece], None],
    ):
        self.number, self.request, self.texts, self.send = number, request, texts, send
        self.out = TextOut(texts.decode, stop)
        self.keeps_state = keeps_state and bool(stop)
        # A state before what is held back; text shown, and tokens, since
        self.behind: tuple[RecurrentCache | None, str, list[int]] | None = None
        self.held: list[Token] = []
        self.seen = 0  # tokens
        self.remembered = 0

    def move(self, batch: ContinuousBatch) -> Piece | None:
        """After a step: what is new; None: nothing to be shown."""
        request, text = self.request, ""
        for token in request.tokens[self.seen :]:
            self._keep(token)
            if not (request.finish_reason == "stop" and token == request.tokens[-1]):
                text += self._push(token, batch)
            self.seen += 1
        if request.finish_reason is None and not self.out.stopped:
            tokens = self._shown()
            return Piece(self.number, text, tokens) if text or tokens else None
        if not self.out.stopped:
            text += self.out.end()
        if not self.out.stopped:
            unread = [] if request.finish_reason == "stop" else request.unread
            return Piece(self.number, text, self.held, Ending(request.finish_reason or "", request.state, unread))
        batch.pause(request)
        return Piece(self.number, text, self._shown(), Ending("stop", *self._end()))

    def _push(self, token: int, batch: ContinuousBatch) -> str:
        held = self.out.holds
        text = self.out.push(token)
        if not self.keeps_state or not (self.out.holds or self.out.stopped):
            self.behind = None
            return text
        if not held:
            ended = self.request.finish_reason is not None
            self.behind = self.request.state if ended else batch.snapshot(self.request), "", []
        state, since, ids = self.behind  # type: ignore[misc]
        self.behind = state, since + text, [*ids, token]
        return text

    def _end(self) -> tuple[RecurrentCache | None, list[int]]:
        """The state in front of a stop string, and what is still to be read: tokens that lie in front of it, and, where
        it begins inside one, the rest of the text anew."""
        if self.behind is None:
            return self.request.state, self.request.unread
        state, text, ids = self.behind
        for count in range(len(ids), 0, -1):
            if text.startswith(part := self.texts.decode(ids[:count])):
                return state, ids[:count] + self.texts.encode(text[len(part) :], begins=False)
        return state, self.texts.encode(text, begins=False)

    def _keep(self, token: int) -> None:
        if self.request.logprobs is not None:
            n = self.seen
            self.held.append(
                Token(token, self.request.token_logprobs[n], self.request.top_logprobs[n], self.out.length)
            )

    def _shown(self) -> list[Token]:
        """Tokens whose text has begun to be shown."""
        every = not self.out.holds and not self.out.stopped
        shown = [token for token in self.held if every or token.offset < self.out.shown]
        self.held = self.held[len(shown) :]
        return shown
