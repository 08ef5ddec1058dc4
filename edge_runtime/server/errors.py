"""An error → status and body, in the form of the API that was called, in the middle of a stream, too.

Known errors keep their sentence, without paths of this machine. Anything else is logged, and the client only learns
that it happened.
"""

from __future__ import annotations

import asyncio
import logging
import re
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from edge_runtime.errors import (
    AddressRefused,
    BackendUnavailable,
    CacheFull,
    DownloadError,
    EdgeRuntimeError,
    EngineBusy,
    ImageError,
    MessageError,
    ModelFileError,
    NotEnoughMemoryError,
    PromptTooLongError,
    RequestCancelled,
    StoreError,
    StoreFull,
)
from edge_runtime.server.sse import as_json

logger = logging.getLogger("edge_runtime.server")

LLAMA_SERVER = (
    *(
        "/apply-template",
        "/audio/",
        "/chat/",
        "/completion",
        "/detokenize",
        "/embedding",
        "/infill",
        "/lora-adapters",
    ),
    *("/models", "/props", "/rerank", "/responses", "/slots", "/tokenize", "/v1/rerank"),
)
"""Prefixes of llama-server's paths; its clients expect errors in its form."""
RETRY_AFTER_S = 5
"""Sent to clients that are turned away."""
Api = Literal["ollama", "openai", "anthropic", "llama"]


class ServerError(EdgeRuntimeError):
    """A request that this server refuses; subclasses say with which status and OpenAI's `code`."""

    status = 400
    code: str | None = None


class RequestError(ServerError):
    """A body or a field of the wrong form.

    Parameters
    ----------
    details : what Anthropic's packages read from an error to try another way.
    """

    def __init__(self, message: str, param: str | None = None, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.param, self.details = param, details


class ModelNotFound(ServerError):  # noqa: N818 - as OpenAI calls it
    """No model has this name."""

    status, code = 404, "model_not_found"


class NotAllowed(ServerError):  # noqa: N818 - says what is the matter
    """Something that the owner has not allowed."""

    status = 403


class Unauthorized(ServerError):  # noqa: N818 - as HTTP calls it
    """No key, or a wrong one."""

    status, code = 401, "invalid_api_key"


class TooLarge(ServerError):  # noqa: N818 - says what is the matter
    """A body, or something inside it, beyond its limit."""

    status = 413


class TooManyConnections(ServerError):  # noqa: N818 - says what is the matter
    """A connection beyond what the server, or one client, may have."""

    status, code = 503, "too_many_connections"


class TimedOut(ServerError):  # noqa: N818 - says what is the matter
    """A request that took longer than the owner allows."""

    status, code = 504, "timeout"


class NotOffered(ServerError):  # noqa: N818 - says what is the matter
    """A route of another server that this one knows but does not have."""

    status, code = 501, "not_available"


class ShuttingDown(ServerError):  # noqa: N818 - says what is the matter
    """The server is ending."""

    status = 503


@dataclass(frozen=True)
class Problem:
    """An error as clients see it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    n_prompt: int | None = None
    """Tokens of a prompt that is too long."""
    n_ctx: int | None = None
    details: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        if self.status == 404:
            return "not_found_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self, api: Api) -> dict[str, Any]:
        """The JSON object of an API."""
        if api == "ollama":
            return {"error": self.message}
        if api == "anthropic":
            kind = {413: "request_too_large", 529: "overloaded_error"}.get(self.status, self.kind)
            kind = "api_error" if kind == "server_error" else kind
            details = {} if self.details is None else {"details": self.details}
            return {"type": "error", "error": {"type": kind, "message": self.message, **details}}
        if api == "llama":
            return {"error": self._for_llama()}
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def _for_llama(self) -> dict[str, Any]:
        """As llama-server writes it."""
        kind = {501: "not_supported_error", 503: "unavailable_error"}.get(self.status, self.kind)
        found = {"code": self.status, "message": self.message, "type": kind}
        if self.n_prompt is None:
            return found
        numbers = {"n_prompt_tokens": self.n_prompt, "n_ctx": self.n_ctx}
        return {**found, "type": "exceed_context_size_error", **numbers}

    def response(self, api: Api) -> Response:
        """The answer to a request."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(as_json(self.body(api)), self.status, headers, "application/json")


# Classes of the runtime's errors, most specific first: (status, OpenAI's code, Retry-After).
_STATUS: tuple[tuple[type[EdgeRuntimeError], int, str | None, int | None], ...] = (
    (ImageError, 400, "invalid_image", None),
    (MessageError, 400, "invalid_request", None),
    (RequestCancelled, 503, "shutting_down", RETRY_AFTER_S),
    (EngineBusy, 429, "rate_limit_exceeded", RETRY_AFTER_S),
    (NotEnoughMemoryError, 503, "not_enough_memory", RETRY_AFTER_S),
    (ModelFileError, 500, "model_unusable", None),
    (CacheFull, 500, "model_unusable", None),
    (AddressRefused, 403, None, None),
    (StoreFull, 507, "store_full", None),
    (StoreError, 507, "storage_failed", None),
    (DownloadError, 502, "download_failed", None),
    (BackendUnavailable, 501, "not_available", None),
)


def problem_of(error: BaseException) -> Problem:
    """What clients are told about an error."""
    if isinstance(error, ServerError):
        retry = RETRY_AFTER_S if error.status in (429, 503) else None
        param, details = getattr(error, "param", None), getattr(error, "details", None)
        return Problem(error.status, without_paths(str(error)), error.code, param, retry, details=details)
    if isinstance(error, PromptTooLongError):
        numbers = (error.n_prompt, error.n_ctx)
        return Problem(400, str(error), "context_length_exceeded", None, None, *numbers)
    for kind, status, code, retry in _STATUS:
        if isinstance(error, kind):
            keeps_text = isinstance(error, MessageError)  # /properties/a is a place in a schema
            return Problem(status, str(error) if keeps_text else without_paths(str(error)), code, None, retry)
    if isinstance(error, RequestValidationError):
        return _validation(error)
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail))
    if isinstance(error, asyncio.CancelledError):
        return Problem(503, "The server is shutting down; try again later.", retry_after=RETRY_AFTER_S)
    if isinstance(error, ClientDisconnect):  # in the middle of a body: nobody will read this
        return Problem(400, "The client left before its request was complete.")
    logger.error("A request failed unexpectedly", exc_info=error)
    return Problem(500, "Something went wrong inside the server; see its log.", "internal_error")


_PATH = re.compile(r"(?<![\w:/.#$~-])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\",;:()]+)*[/\\]([^\s/\\'\",;:()]+)")
_ROUTE = re.compile(
    r"/(?:api|v1)/[\w{}/:.-]*|/(?:apply-template|chat/completions|completions?|detokenize|health|metrics|models|props"
    r"|responses|slots|tokenize|version)"
)
"""Routes of this server; none of them is a file."""


def without_paths(text: str) -> str:
    """A sentence with paths of this machine cut to their last part; web addresses and routes stay."""
    return _PATH.sub(lambda found: found[0] if _ROUTE.fullmatch(found[0].rstrip(".")) else found[1], text)


def _validation(error: RequestValidationError) -> Problem:
    """The first error that pydantic found, as a sentence."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    where = ".".join(part for part in place if "[" not in part)  # without the names of a union's alternatives
    if first["type"] == "json_invalid":
        return Problem(400, f"The body is not valid JSON ({first['ctx']['error']}); expected one JSON object.")
    what = f"{where}: " if where else "The body: "
    return Problem(400, f"{what}{first['msg']}.", "invalid_request", where or None)


def api_of(path: str) -> Api:
    """The API that a path belongs to, whose clients expect errors in its form."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith(LLAMA_SERVER):
        return "llama"
    return "openai" if path.startswith("/v1/") else "ollama"


def error_response(error: Exception, path: str) -> Response:
    """An error as the response to a request for this path."""
    return problem_of(error).response(api_of(path))


def error_line(error: BaseException, api: Api) -> str:
    """An error as the last JSON object of a stream."""
    return as_json(problem_of(error).body(api))


def install(app: FastAPI) -> None:
    """Register this module as the handler of all errors."""

    async def answer(request: Request, error: Exception) -> Response:
        response = error_response(error, request.url.path)
        if isinstance(error, HTTPException):
            response.headers.update(error.headers or {})  # such as Allow, when a route does not have the method
        return response

    for kind in (EdgeRuntimeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
