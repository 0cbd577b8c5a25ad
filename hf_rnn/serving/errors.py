"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger("uvicorn.error")  # where uvicorn writes


class APIError(HTTPException):
    """What a client is told.

    Args:
        status: of HTTP.
        message: what was expected.
        param: of which parameter.
        code: for programs.
        retry_after: seconds until it may be worth another try.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, detail=message, headers=headers)
        self.param, self.code = param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    printable = [x if x is None else x.encode("utf-8", "backslashreplace").decode() for x in (message, param)]
    return {"error": {"message": printable[0], "type": kind, "param": printable[1], "code": code}}


def error_response(error: HTTPException) -> JSONResponse:
    message = error.detail or HTTPStatus(error.status_code).phrase
    param, code = (error.param, error.code) if isinstance(error, APIError) else (None, None)
    return JSONResponse(error_body(error.status_code, message, param, code), error.status_code, error.headers)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """What pydantic found, its first complaint: the parameter, and what was expected."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    path = [str(part) for part in found["loc"] if part not in ("body", "str", "int")]
    param = ".".join(part for part in path if "[" not in part and "-" not in part)[:200]  # but for pydantic's types
    if found["type"] == "extra_forbidden":
        return error_response(APIError(400, f"{param}: not known here", param, "unknown_parameter"))
    if found["type"] == "json_invalid":
        return error_response(APIError(400, f"body: no JSON, {found['ctx']['error']} (character {param})"))
    return error_response(APIError(400, f"{param or 'body'}: {found['msg']}", param or None))


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, "the server failed; its log says why"), 500)


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unforeseen)


class BodyLimit:
    """Lets no body through that is larger than `max_bytes`, declared or sent: 413."""

    def __init__(self, app: Any, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope, receive, send) -> None:
        error = APIError(413, f"body: expected at most {self.max_bytes} bytes", code="body_too_large")
        declared = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if scope["type"] == "http" and declared.isdigit() and int(declared) > self.max_bytes:
            await error_response(error)(scope, receive, send)
            return
        seen = 0

        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise error
            return message

        await self.app(scope, counted, send)
