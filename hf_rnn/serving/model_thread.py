"""One thread owns the model. Texts reach it by a queue, and what becomes of them goes back to asyncio."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hf_rnn.generation.batching import ContinuousBatch, Request
from hf_rnn.serving.errors import log
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
    """A text on its way to a client. All but its making belongs to the model's thread.

    Args:
        number: among those of one request.
        request: of the batch.
        texts: of the model's tokenizer.
        stop: strings with which it ends.
        keeps_state: whether somebody goes on from its ending, which is then in front of a stop string.
        send: takes each piece, in asyncio's thread.
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


class ModelThread(threading.Thread):
    """Steps the batch as long as there is something to do.

    Args:
        batch: the model's.
        loop: of asyncio, where pieces go.

    Attributes:
        tokens: generated so far.
        seconds: spent in steps.
    """

    def __init__(self, batch: ContinuousBatch, loop: asyncio.AbstractEventLoop):
        super().__init__(name="model", daemon=True)
        self.batch, self.loop = batch, loop
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.choices: dict[Request, Choice] = {}
        self.readers: dict[Request, list[Choice]] = {}  # a prompt that several texts go on from
        self.tokens, self.seconds = 0, 0.0

    def submit(self, choices: list[Choice]) -> None:
        """Texts with one prompt, which is read once. Any thread."""
        self.commands.put(lambda: self._add(choices))

    def cancel(self, choices: list[Choice]) -> None:
        """Nobody waits for them any more; nothing is sent of them. Any thread."""
        self.commands.put(lambda: self._cancel(choices))

    def stop(self) -> None:
        """End the thread, between two steps. Texts that are not ready end nowhere."""
        self.commands.put(None)

    def run(self) -> None:
        while True:
            while not self.batch.busy or not self.commands.empty():
                command = self.commands.get()
                if command is None:
                    return
                command()
            start = time.perf_counter()
            pieces = self._step()
            self.seconds += time.perf_counter() - start
            if pieces:
                self.loop.call_soon_threadsafe(_send, pieces)

    def _add(self, choices: list[Choice]) -> None:
        first = choices[0].request
        if len(choices) > 1 and len(first.unread) > 1:
            reader = self.batch.add(Request(first.unread[:-1], 0, state=first.state))
            self.readers[reader] = choices
        else:
            for choice in choices:
                self._start(choice)

    def _start(self, choice: Choice) -> None:
        self.choices[choice.request] = choice
        self.batch.add(choice.request)

    def _cancel(self, choices: list[Choice]) -> None:
        for reader, waiting in list(self.readers.items()):
            self.readers[reader] = [choice for choice in waiting if choice not in choices]
            reader.cancelled = not self.readers[reader]
        for choice in choices:
            choice.request.cancelled = True
            self.choices.pop(choice.request, None)

    def _step(self) -> list[tuple[Choice, Piece]]:
        try:
            return self._moved(self.batch.step())
        except Exception:  # out of memory, say: whoever is in the batch may be disturbed; sessions are not in it
            log.exception("a step of the model failed")
            lost = [*self.choices.values(), *(choice for some in self.readers.values() for choice in some)]
            self.batch = ContinuousBatch(self.batch.model, self.batch.max_rows, self.batch.prompt_tokens)
            self.choices, self.readers = {}, {}
            ending = Ending("error: the model failed", None, [])
            return [(choice, Piece(choice.number, "", [], ending)) for choice in lost]

    def _moved(self, requests: list[Request]) -> list[tuple[Choice, Piece]]:
        pieces = []
        for request in requests:
            for waiting in self.readers.pop(request, []):
                waiting.request.unread, waiting.request.state = waiting.request.unread[-1:], request.state
                self._start(waiting)
            choice = self.choices.get(request)
            if choice is None:
                continue
            self.tokens += len(request.tokens) > choice.seen
            piece = choice.move(self.batch)
            if piece is not None:
                pieces.append((choice, piece))
            if piece is not None and piece.ending is not None:
                del self.choices[request]
        return pieces


def _send(pieces: list[tuple[Choice, Piece]]) -> None:
    for choice, piece in pieces:
        choice.send(piece)
