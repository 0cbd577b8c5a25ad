"""What the endpoints share, and a request on its way."""

import asyncio
import hmac
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request

from hf_rnn.generation import batching
from hf_rnn.generation.prompt_cache import PromptCache
from hf_rnn.serving.choice import Choice, Piece
from hf_rnn.serving.errors import APIError, log
from hf_rnn.serving.limits import Limits, owner_of
from hf_rnn.serving.model_thread import ModelThread
from hf_rnn.serving.protocol import ChatBody, CompletionBody, usage
from hf_rnn.serving.sessions import SWEEP_SECONDS, Session, Sessions
from hf_rnn.serving.text import Texts


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine to itself alone."""
    try:
        return host == "localhost" or ip_address(host or "").is_loopback
    except ValueError:
        return False


def host_of(request: Request) -> str | None:
    """The name by which a client reached the server; None: none that can be read, for which `request.url` would have
    the server's own address."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


class Server:
    """What the endpoints share.

    Args:
        model: a causal language model of this package, in eval mode.
        texts: of its tokenizer.
        name: of the model, to clients.
        keys: API keys; none: whoever reaches the server may use it.
        folder: of parked sessions, or None.
        limits: see there.
    """

    def __init__(self, model: Any, texts: Texts, name: str, keys: list[str], folder: Path | None, limits: Limits):
        self.model, self.texts, self.name, self.keys, self.limits = model, texts, name, keys, limits
        self.batch = batching.ContinuousBatch(model, limits.max_rows, limits.prompt_tokens)
        self.prompts = PromptCache(model, limits.prompt_cache_bytes, limits.prompt_tokens)
        self.sessions = Sessions(model, self.batch.initial_state(), folder, limits)
        ends = model.generation_config.eos_token_id
        self.ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        self.created = int(time.time())
        self.running = 0  # texts, those that wait included
        self.requests, self.prompt_tokens = 0, 0
        self.thread: ModelThread

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """While the server runs: the model's thread, and a look at the sessions each minute. Then all are parked."""
        self.thread = ModelThread(self.batch, self.prompts, asyncio.get_running_loop())
        self.thread.start()
        sweeping = asyncio.create_task(self._sweep())
        try:
            yield
        finally:  # a second Ctrl-C cancels the wait, and parks as well
            sweeping.cancel()
            self.thread.stop()
            await asyncio.to_thread(self.thread.join)
            if lost := await self.sessions.park_all():
                log.error("%d sessions could not be parked and are lost", lost)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await self.sessions.sweep()
            except OSError:
                log.exception("looking after the sessions failed")

    def owner(self, request: Request) -> str:
        """Whose request it is, by its key.

        Raises:
            APIError: 401; 403 for a page of another name that leads here, since without keys this machine's own
                programs alone are welcome.
        """
        if not self.keys and not is_loopback(host_of(request)):
            raise APIError(403, "Host: expected localhost; a server for others needs keys")
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        found = [key for key in self.keys if hmac.compare_digest(key.encode(), given)]
        if self.keys and not found:
            raise APIError(401, "expected a key of this server's: Authorization: Bearer ...", code="invalid_api_key")
        return owner_of(found[0] if found else "")

    def check(self, ids: list[int]) -> None:
        """Of a prompt.

        Raises:
            APIError: 400, no tokens, too many, or others than the model's.
        """
        size, most = self.model.config.vocab_size, self.limits.max_prompt_tokens
        if not ids:
            raise APIError(400, "prompt: expected at least one token", "prompt")
        if len(ids) > most:
            raise APIError(400, f"prompt: expected at most {most} tokens, got {len(ids)}", "prompt", "prompt_too_long")
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise APIError(400, f"prompt: expected tokens in [0, {size}), got {wrong[0]}", "prompt")

    def health(self) -> dict[str, Any]:
        thread = self.thread
        return {
            "status": "ok" if thread.is_alive() else "the model's thread is dead",
            "model": self.name,
            "rows": len(thread.batch.rows),
            "waiting": len(thread.batch.waiting),
            "requests": self.requests,
            "tokens": {
                "prompts": self.prompt_tokens,
                "remembered": thread.remembered,
                "generated": thread.tokens,
            },
            "seconds": {"up": round(time.time() - self.created, 3), "model": round(thread.seconds, 3)},
            "sessions": self.sessions.health(),
        }


def check_count(server: Server, body: CompletionBody | ChatBody) -> None:
    """How many texts are asked for, before their prompts are made tokens.

    Raises:
        APIError: 400.
    """
    prompts, most = len(body.prompts) if isinstance(body, CompletionBody) else 1, server.limits.max_choices
    count = (body.n or 1) * prompts
    if count > most:
        raise APIError(400, f"n: expected at most {most} texts together, got {count}", "n")
    if body.session is not None and count > 1:
        raise APIError(400, "session: expected one prompt and n=1", "session")


class Generation:
    """One request's texts, from their admission to the last piece.

    Raises:
        APIError: 400 what is asked for is beyond the limits; 429 too many texts wait.
    """

    def __init__(
        self,
        server: Server,
        body: CompletionBody | ChatBody,
        prompts: list[list[int]],
        most: int,
        stops: list[str],
        owner: str,
        session: Session | None,
    ):
        limits, n = server.limits, body.n or 1
        self.server, self.session, self.pieces = server, session, asyncio.Queue[Piece]()
        count, free = n * len(prompts), limits.max_rows + limits.max_waiting - server.running
        if most > limits.max_tokens:
            raise APIError(400, f"max_tokens: expected at most {limits.max_tokens}, got {most}", "max_tokens")
        if count > free:
            raise APIError(429, "too many texts wait for their turn", code="queue_full", retry_after=1)
        for ids in prompts:
            server.check(ids)
        seeds = itertools.repeat(None) if body.seed is None else (body.seed % 2**64 + i for i in range(count))
        self.choices: list[list[Choice]] = []
        for ids in prompts:
            state = None if session is None else session.state
            own = [
                batching.Request(ids, most, body.sampling, server.ends, seed, state, body.asked_logprobs)
                for _, seed in zip(range(n), seeds, strict=False)
            ]
            first = n * len(self.choices)
            self.choices.append([self._choice(first + i, request, stops) for i, request in enumerate(own)])
        self.prompt_tokens = sum(map(len, prompts))
        self.open = count
        server.running += count
        server.requests += 1
        server.prompt_tokens += self.prompt_tokens
        for some in self.choices:
            server.thread.submit(some, owner)

    def _choice(self, index: int, request: batching.Request, stops: list[str]) -> Choice:
        return Choice(index, request, self.server.texts, stops, self.session is not None, self.pieces.put_nowait)

    @property
    def all(self) -> list[Choice]:
        return [choice for some in self.choices for choice in some]

    def usage(self) -> dict[str, Any]:
        new = sum(len(choice.request.tokens) for choice in self.all)
        return usage(self.prompt_tokens, new, sum(some[0].remembered for some in self.choices))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces as they come. With the last one the session has gone on; if that never comes, it stays as it was.

        Raises:
            APIError: 500, the model failed.
        """
        while self.open > 0:
            piece = await self.pieces.get()
            if piece.ending is not None:
                if piece.ending.reason.startswith("error"):
                    raise APIError(500, piece.ending.reason)
                self.open -= 1
                if self.session is not None and piece.ending.state is not None:
                    self.server.sessions.go_on(self.session, piece.ending.state, piece.ending.unread)
                if not self.open:
                    self.close()  # before a client knows of the end, so that it may go on with the session at once
            yield piece

    def close(self) -> None:
        """Whatever is not ready is cancelled, and others may have the session."""
        if self.open >= 0:
            if self.open:
                self.server.thread.cancel(self.all)
            self.server.running -= len(self.all)
            self.open = -1
            if self.session is not None:
                self.server.sessions.give_back(self.session)
