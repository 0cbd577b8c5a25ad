"""The endpoints."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from hf_rnn.serving.errors import APIError, BodyLimit, add_error_handlers, error_body
from hf_rnn.serving.protocol import ChatBody, ChatShape, CompletionBody, CompletionShape, SessionBody, event
from hf_rnn.serving.server import Generation, Server, check_count
from hf_rnn.serving.sessions import Session
from hf_rnn.serving.text import PLAIN_STOP

DEFAULT_TOKENS = 16  # of a completion, as OpenAI's
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
}


def make_app(server: Server) -> FastAPI:
    """All endpoints of a server. No CORS: pages of other places cannot read what they answer."""
    app = FastAPI(lifespan=server.lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=server.limits.max_body_bytes)
    add_error_handlers(app)
    Owner = Annotated[str, Depends(server.owner)]
    page = files("hf_rnn.serving").joinpath("page.html").read_text(encoding="utf-8")
    model = {"id": server.name, "object": "model", "created": server.created, "owned_by": "hf_rnn"}

    @app.get("/")
    async def root() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return server.health()

    @app.get("/v1/models")
    async def models(owner: Owner) -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(owner: Owner, name: str) -> dict[str, Any]:
        _check_model(server, name)
        return model

    @app.post("/v1/completions")
    async def completions(owner: Owner, body: CompletionBody, request: Request) -> Response:
        return await _generate(server, owner, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(owner: Owner, body: ChatBody, request: Request) -> Response:
        return await _generate(server, owner, body, request)

    @app.get("/v1/sessions")
    async def sessions(owner: Owner) -> dict[str, Any]:
        return {"object": "list", "data": await server.sessions.listed(owner)}

    @app.post("/v1/sessions")
    async def begin(owner: Owner, body: SessionBody) -> dict[str, Any]:
        return (await server.sessions.begin(owner, body.name, body.source)).describe()

    @app.get("/v1/sessions/{name:path}")
    async def session(owner: Owner, name: str) -> dict[str, Any]:
        found = await server.sessions.take(owner, name)
        server.sessions.give_back(found)
        return found.describe()

    @app.delete("/v1/sessions/{name:path}")
    async def delete(owner: Owner, name: str) -> dict[str, Any]:
        await server.sessions.delete(owner, name)
        return {"id": name, "object": "session", "deleted": True}

    return app


def _check_model(server: Server, name: str) -> None:
    if name != server.name:
        raise APIError(404, f"model: expected {server.name!r}, got {name[:200]!r}", "model", "model_not_found")


async def _generate(server: Server, owner: str, body: CompletionBody | ChatBody, request: Request) -> Response:
    """Answer a request for texts, at once or as a stream."""
    _check_model(server, body.model)
    check_count(server, body)
    session = None if body.session is None else await server.sessions.take(owner, body.session)
    try:
        prompts = await asyncio.to_thread(_prompts, server, body, session)
        generation = Generation(server, body, prompts, _most(server, body), _stops(server, body), owner, session)
    except BaseException:
        if session is not None:
            server.sessions.give_back(session)
        raise
    answer = Answer(server, generation, body)
    if body.stream:
        return Stream(generation, answer.events())
    waiting = [asyncio.create_task(answer.whole()), asyncio.create_task(_disconnected(request))]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(waiting[0].result()) if waiting[0].done() else Response(status_code=499)
    finally:
        for task in waiting:
            task.cancel()
        generation.close()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _prompts(server: Server, body: CompletionBody | ChatBody, session: Session | None) -> list[list[int]]:
    """The tokens to be read, those first that a session has left unread."""
    begins = session is None or session.begins
    unread = [] if session is None else session.unread
    if isinstance(body, ChatBody):
        try:
            return [unread + server.texts.chat([message.plain for message in body.messages], begins)]
        except ValueError as error:
            raise APIError(400, str(error), "messages") from error
    texts = [server.texts.encode(x, begins) if isinstance(x, str) else list(x) for x in body.prompts]
    return [unread + ids for ids in texts]


def _most(server: Server, body: CompletionBody | ChatBody) -> int:
    if isinstance(body, CompletionBody):
        return min(DEFAULT_TOKENS, server.limits.max_tokens) if body.max_tokens is None else body.max_tokens
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return server.limits.max_tokens if asked is None else asked


def _stops(server: Server, body: CompletionBody | ChatBody) -> list[str]:
    plain = isinstance(body, ChatBody) and not server.texts.has_template
    return [*body.stops, PLAIN_STOP] if plain else body.stops


class Answer:
    """A generation in OpenAI's words."""

    def __init__(self, server: Server, generation: Generation, body: CompletionBody | ChatBody):
        self.texts, self.generation, self.body = server.texts, generation, body
        self.shape = ChatShape() if isinstance(body, ChatBody) else CompletionShape()
        self.about = {"id": f"{self.shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def _choice(self, index: int, text: str, tokens: list, reason: str | None, streamed: bool) -> dict[str, Any]:
        asked = self.body.asked_logprobs is not None
        logprobs = self.shape.logprobs(tokens, self.texts) if asked else None
        return self.shape.choice(index, text, logprobs, reason, streamed)

    async def whole(self) -> dict[str, Any]:
        texts: dict[int, str] = {choice.number: "" for choice in self.generation.all}
        tokens: dict[int, list] = {index: [] for index in texts}
        reasons: dict[int, str] = {}
        async for piece in self.generation:
            texts[piece.number] += piece.text
            tokens[piece.number] += piece.tokens
            if piece.ending is not None:
                reasons[piece.number] = piece.ending.reason
        choices = [self._choice(i, text, tokens[i], reasons[i], False) for i, text in texts.items()]
        return {**self.about, "object": self.shape.whole, "choices": choices, "usage": self.generation.usage()}

    async def events(self) -> AsyncIterator[str]:
        chunk = {**self.about, "object": self.shape.chunk}
        for text in self.generation.all:
            for first in self.shape.first(text.number):
                yield event({**chunk, "choices": [first]})
        try:
            async for piece in self.generation:
                reason = None if piece.ending is None else piece.ending.reason
                choice = self._choice(piece.number, piece.text, piece.tokens, reason, True)
                yield event({**chunk, "choices": [choice]})
        except APIError as error:
            yield event(error_body(error.status_code, error.detail))
            return
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event({**chunk, "choices": [], "usage": self.generation.usage()})
        yield event("[DONE]")


class Stream(StreamingResponse):
    """Server-sent events of a generation, which ends with them, however they end."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[str]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.generation = generation

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.close()
