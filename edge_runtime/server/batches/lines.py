"""A line of an OpenAI batch → a request to the application in this process → a line with its answer.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"id": "batch_req_…", "custom_id": "a", "error": null,
     "response": {"status_code": 200, "request_id": "req_…", "body": {...}}}

No socket is needed: `call` speaks ASGI. Rules for lines, codes and forms of errors are those of OpenAI's batches:
https://platform.openai.com/docs/guides/batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Scope

from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.server.middleware import json_bodies
from edge_runtime.server.middleware.shares import BACKGROUND, Background
from edge_runtime.server.settings import Settings
from edge_runtime.server.sse import as_json

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""Routes that answer lines."""
MAX_LINES = 50_000
"""Of a file, as in OpenAI's batches."""
MAX_ID = 512
"""Characters of a custom_id."""
LINE_EXTRA_BYTES = 4096
"""What a line has besides its body."""
FIELDS = ("custom_id", "method", "url", "body")


class LineRefused(EdgeRuntimeError):  # noqa: N818 - says what is the matter
    """A line that cannot be answered.

    Parameters
    ----------
    code, param, line : as OpenAI's errors of batches have them; lines are counted from 1.
    custom_id : of the line, if it has a usable one.
    """

    def __init__(
        self, code: str, message: str, line: int | None, param: str | None = None, custom_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.line, self.param, self.custom_id = code, line, param, custom_id

    def as_error(self) -> dict[str, Any]:
        """An entry of a batch's `errors.data`."""
        return {"code": self.code, "message": str(self), "param": self.param, "line": self.line}


@dataclass(frozen=True)
class Line:
    """A request of a batch."""

    number: int
    """Of the line in its file, from 1."""
    custom_id: str
    url: str
    """One of the endpoints."""
    body: Mapping[str, Any]

    @property
    def model(self) -> str | None:
        """The model as the client names it; None is the server's default."""
        found = self.body.get("model")
        return found if isinstance(found, str) and found else None


@dataclass(frozen=True)
class Reply:
    """What the application answered."""

    status: int
    body: bytes


# --- reading --------------------------------------------------------------------------------------------------------


def raw_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines of a file that are not blank, with their numbers from 1, in bounded memory.

    Parameters
    ----------
    max_bytes : of one line.

    Raises
    ------
    LineRefused
        When a line is longer; the file is then read no further.
    OSError
    """
    number = 0
    while data := file.readline(max_bytes + 2):
        number += 1
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, as Windows writes it
        if len(data.rstrip(b"\r\n")) > max_bytes:
            raise LineRefused(
                "line_too_long",
                f"Line {number} has more than {max_bytes} bytes, which is the limit; send fewer or smaller pictures "
                "in it.",
                number,
            )
        if stripped := data.strip():
            yield number, stripped


def max_line_bytes(settings: Settings) -> int:
    """Bytes that a line may have: those of a request's body, and its frame."""
    return settings.max_body_bytes + LINE_EXTRA_BYTES


def parse(data: bytes, number: int, settings: Settings, endpoints: Collection[str] = ENDPOINTS) -> Line:
    """Read a line.

    Parameters
    ----------
    data : without the line's end.
    endpoints : what its `url` may be.

    Raises
    ------
    LineRefused
        Names the field, what was found and what was expected.
    """
    value = _json_object(data, number, settings)
    custom_id = _custom_id(value, number)

    def refused(code: str, message: str, param: str) -> LineRefused:
        return LineRefused(code, f"Line {number}: {message}", number, param, custom_id)

    missing = [name for name in FIELDS if value.get(name) is None]
    if missing:
        raise refused(
            "missing_required_parameter", f"{missing[0]} is missing; expected {', '.join(FIELDS)}.", missing[0]
        )
    method, url, body = value["method"], value["url"], value["body"]
    if method != "POST":
        raise refused("invalid_method", f"method is {_shown(method)}; expected POST.", "method")
    if url not in endpoints:
        code = "url_mismatch" if len(endpoints) == 1 and url in ENDPOINTS else "invalid_url"
        raise refused(code, f"url is {_shown(url)}; expected {' or '.join(endpoints)}.", "url")
    if not isinstance(body, dict):
        raise refused("invalid_value", f"body is {_shown(body)}; expected the JSON object of a request.", "body")
    if body.get("stream"):
        raise refused("invalid_value", "stream is set, but a batch has whole answers; leave it out.", "body.stream")
    if body.get("background"):
        raise refused(
            "invalid_value", "background is set, but a batch is in the background; leave it out.", "body.background"
        )
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise refused("invalid_value", f"model is {_shown(model)}; expected a name.", "body.model")
    return Line(number, custom_id, url, body)


def _json_object(data: bytes, number: int, settings: Settings) -> dict[str, Any]:
    try:
        value = json_bodies.read(data, settings)
    except HTTPException as error:
        raise LineRefused("invalid_json_line", f"Line {number}: {error.detail}", number) from None
    except ValueError as error:
        raise LineRefused(
            "invalid_json_line", f"Line {number} is not valid JSON ({error}); expected one object a line.", number
        ) from None
    if not isinstance(value, dict):
        raise LineRefused("invalid_json_line", f"Line {number} is {_shown(value)}; expected a JSON object.", number)
    return value


def _custom_id(value: Mapping[str, Any], number: int) -> str:
    found = value.get("custom_id")
    if found is None:
        code, message = "missing_required_parameter", "custom_id is missing; expected a text that no other line has."
    elif not isinstance(found, str) or not found:
        code, message = "invalid_value", f"custom_id is {_shown(found)}; expected a text that no other line has."
    elif len(found) > MAX_ID:
        code, message = "invalid_value", f"custom_id has {len(found)} characters; expected at most {MAX_ID}."
    elif not _is_unicode(found):
        code, message = "invalid_value", "custom_id holds half of a surrogate pair; expected whole characters."
    else:
        return found
    raise LineRefused(code, f"Line {number}: {message}", number, "custom_id")


def _is_unicode(text: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        return True
    return False


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return as_json(value if not isinstance(value, float) else str(value))[:80]


# --- a whole file ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckedFile:
    """What a file holds."""

    total: int
    """Requests in it."""
    model: str | None
    """That all of them ask."""
    errors: tuple[LineRefused, ...]
    """The first ones; without any, the file can be worked through."""


def check_file(
    path: Path,
    settings: Settings,
    endpoint: str,
    max_lines: int = MAX_LINES,
    max_errors: int = 50,
    on_line: Callable[[], None] = lambda: None,
) -> CheckedFile:
    """Read every line of a file, as it is done before any of them is answered.

    Parameters
    ----------
    on_line : called before each; an exception from it ends the work.

    Raises
    ------
    OSError
    """
    errors: list[LineRefused] = []
    seen: dict[str, int] = {}
    models: dict[str | None, int] = {}
    total = 0
    with path.open("rb") as file:
        lines = raw_lines(file, max_line_bytes(settings))
        while len(errors) < max_errors:
            try:
                number, data = next(lines)
            except StopIteration:
                break
            except LineRefused as error:
                errors.append(error)
                break
            on_line()
            total += 1
            if total > max_lines:
                message = f"The file has more than {max_lines} requests, which is the limit; split it."
                errors.append(LineRefused("too_many_tasks", message, number))
                break
            try:
                line = parse(data, number, settings, (endpoint,))
                _check_beside_others(line, seen, models)
            except LineRefused as error:
                errors.append(error)
    if not total and not errors:
        errors.append(LineRefused("empty_file", "The file has no lines; expected one request a line.", None))
    return CheckedFile(total, next(iter(models), None), tuple(errors))


def _check_beside_others(line: Line, seen: dict[str, int], models: dict[str | None, int]) -> None:
    """Record a line; raises when it does not go with those before."""
    if (first := seen.setdefault(line.custom_id, line.number)) != line.number:
        raise LineRefused(
            "duplicate_custom_id",
            f"Line {line.number}: custom_id is {_shown(line.custom_id)} as in line {first}; expected one of its own.",
            line.number,
            "custom_id",
            line.custom_id,
        )
    models.setdefault(line.model, line.number)
    if len(models) > 1:
        other = next(iter(models))
        del models[line.model]
        raise LineRefused(
            "model_mismatch",
            f"Line {line.number}: the model is {_shown(line.model)}, in line {models[other]} it is {_shown(other)}; "
            "expected one model in a file.",
            line.number,
            "body.model",
            line.custom_id,
        )


# --- answering ------------------------------------------------------------------------------------------------------


async def call(
    app: ASGIApp, path: str, body: Mapping[str, Any], settings: Settings, background: Background | None = None
) -> Reply:
    """Send a request to the application in this process, through all its middleware, and await the whole reply.

    Parameters
    ----------
    app : `create_app`'s, inside its lifespan.
    background : marks the request as one that gives way to all others, see `shares`.
    """
    data = json.dumps(body).encode()
    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(data)),
    ]
    if settings.api_key is not None:
        headers.append((b"authorization", b"Bearer " + settings.api_key.encode("ascii")))
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": ("localhost", settings.port),
        "state": {},
        "extensions": {} if background is None else {BACKGROUND: background},
    }
    status, found, is_sent = 500, bytearray(), False

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:  # the caller stays until the reply is there; it leaves by cancelling this call
            await asyncio.Event().wait()
        is_sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            found.extend(message.get("body", b""))

    await app(scope, receive, send)
    return Reply(status, bytes(found))


async def answer(app: ASGIApp, line: Line, settings: Settings, background: Background | None = None) -> Reply:
    """Answer a line, as `call`; an unexpected failure becomes a reply with status 500."""
    body = dict(line.body)
    if line.url == "/v1/responses" and body.get("store") is None:
        body["store"] = False  # thousands of responses that nobody continues would displace those of people
    try:
        return await call(app, line.url, body, settings, background)
    except Exception:  # noqa: BLE001 - the application has logged it; the other lines go on
        message = "Something went wrong inside the server; see its log."
        error = {"message": message, "type": "server_error", "param": None, "code": "internal_error"}
        return Reply(500, json.dumps({"error": error}).encode())


# --- writing --------------------------------------------------------------------------------------------------------


def output_line(custom_id: str, reply: Reply) -> bytes:
    """The line of an answer, or of an error with which the application replied; ends with a line feed."""
    try:
        body = json.loads(reply.body)
    except ValueError:
        body = {"error": {"message": reply.body.decode("utf-8", "replace"), "type": "server_error"}}
    response = {"status_code": reply.status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
    return _written(custom_id, response, None)


def error_line(custom_id: str, code: str, message: str) -> bytes:
    """The line of a request that got no answer, such as `batch_expired`; ends with a line feed."""
    return _written(custom_id, None, {"code": code, "message": message})


def _written(custom_id: str, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> bytes:
    line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": error}
    return as_json(line).encode() + b"\n"
