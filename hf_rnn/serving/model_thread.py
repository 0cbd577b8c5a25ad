"""One thread owns the model. Texts reach it by a queue, and what becomes of them goes back to asyncio."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from hf_rnn.generation.batching import ContinuousBatch, Request
from hf_rnn.generation.prompt_cache import PromptCache
from hf_rnn.serving.choice import Choice, Ending, Piece
from hf_rnn.serving.errors import log
from hf_rnn.serving.prompt_reading import PromptReading


class ModelThread(threading.Thread):
    """Steps the batch as long as there is something to do.

    Args:
        batch: the model's.
        prompts: the model's, those that were read before.
        loop: of asyncio, where pieces go.

    Attributes:
        tokens: generated so far.
        remembered: tokens of prompts that were not read again.
        seconds: spent in steps.
    """

    def __init__(self, batch: ContinuousBatch, prompts: PromptCache, loop: asyncio.AbstractEventLoop):
        super().__init__(name="model", daemon=True)
        self.batch, self.prompts, self.loop = batch, prompts, loop
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.choices: dict[Request, Choice] = {}  # all of them, also those whose prompts are read
        self.readings: dict[Request, PromptReading] = {}
        self.tokens, self.remembered, self.seconds = 0, 0, 0.0

    def submit(self, choices: list[Choice], owner: str) -> None:
        """Texts of an owner's with one prompt, which is read once. Any thread."""
        self.commands.put(lambda: self._add(choices, owner))

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
                self._attempt(command)
            start = time.perf_counter()
            self._attempt(self._step)
            self.seconds += time.perf_counter() - start

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:  # out of memory, say: whoever is in the batch may be disturbed; sessions are not in it
            log.exception("a step of the model failed")
            lost, ending = list(self.choices.values()), Ending("error: the model failed", None, [])
            self.batch = ContinuousBatch(self.batch.model, self.batch.max_rows, self.batch.prompt_tokens)
            self.choices, self.readings = {}, {}
            self._tell([(choice, Piece(choice.number, "", [], ending)) for choice in lost])

    def _tell(self, pieces: list[tuple[Choice, Piece]]) -> None:
        if pieces:
            self.loop.call_soon_threadsafe(_send, pieces)

    def _add(self, choices: list[Choice], owner: str) -> None:
        self.choices |= {choice.request: choice for choice in choices}
        reading = PromptReading(choices, owner, self.prompts)
        self.remembered += reading.position
        self._go_on(reading)

    def _go_on(self, reading: PromptReading) -> None:
        part = reading.read(self.batch)
        if part is not None:
            self.readings[part] = reading
            return
        for choice in reading.choices:
            choice.request.unread, choice.request.state = reading.ids[reading.position :], reading.state
            self.batch.add(choice.request)

    def _cancel(self, choices: list[Choice]) -> None:
        for part, reading in self.readings.items():
            reading.choices = [choice for choice in reading.choices if choice not in choices]
            part.cancelled = not reading.choices
        for choice in choices:
            choice.request.cancelled = True
            self.choices.pop(choice.request, None)

    def _step(self) -> None:
        self._tell(self._moved(self.batch.step()))

    def _moved(self, requests: list[Request]) -> list[tuple[Choice, Piece]]:
        pieces = []
        for request in requests:
            if (reading := self.readings.pop(request, None)) is not None and reading.choices:
                reading.end()
                self._go_on(reading)
            choice = self.choices.get(request)
            if choice is None:
                continue
            self.tokens += len(request.tokens) > choice.seen
            piece = choice.move(self.batch)
            if piece is not None:
                pieces.append((choice, piece))
            if piece is not None and piece.ending is not None:
                del self.choices[request]
        for reading in self.readings.values():
            reading.keep(self.batch)
        return pieces


def _send(pieces: list[tuple[Choice, Piece]]) -> None:
    for choice, piece in pieces:
        choice.send(piece)
