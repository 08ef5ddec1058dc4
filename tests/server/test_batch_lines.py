"""Lines of batches: reading, rules, and answers from the application in this process, without a socket."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.server.app import create_app
from edge_runtime.server.batches import lines
from edge_runtime.server.batches.lines import Line, LineRefused, check_file, parse, raw_lines
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import server_of

SETTINGS = Settings(port=0)
CHAT = "/v1/chat/completions"


def request(custom_id: Any = "a", **changes: Any) -> dict[str, Any]:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changes}


def as_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_raw_lines_count_blank_ones_and_bear_every_end():
    data = b"\xef\xbb\xbf1\r\n\n  \n2\n3"
    assert [*raw_lines(io.BytesIO(data), 10)] == [(1, b"1"), (4, b"2"), (5, b"3")]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\nmore\n"])
def test_a_line_too_long_is_refused_by_its_number(end: bytes):
    assert next(iter(raw_lines(io.BytesIO(b"x" * 8 + end), 8))) == (1, b"x" * 8)
    with pytest.raises(LineRefused, match="Line 2 has more than 8 bytes") as caught:
        [*raw_lines(io.BytesIO(b"1\n" + b"x" * 9 + end), 8)]
    assert caught.value.code == "line_too_long"


@pytest.mark.parametrize(
    "data, code, param",
    [
        (b"{", "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"null", "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (b"[" + b"[]," * 200_000 + b"[]]", "invalid_json_line", None),
        (as_bytes({"method": "POST", "url": CHAT, "body": {}}), "missing_required_parameter", "custom_id"),
        (as_bytes(request(7)), "invalid_value", "custom_id"),
        (as_bytes(request("")), "invalid_value", "custom_id"),
        (as_bytes(request("x" * 513)), "invalid_value", "custom_id"),
        (as_bytes(request("\ud800")), "invalid_value", "custom_id"),
        (as_bytes(request(method="GET")), "invalid_method", "method"),
        (as_bytes(request(method=[])), "invalid_method", "method"),
        (as_bytes(request(url="/v1/embeddings")), "invalid_url", "url"),
        (as_bytes(request(url="/v1/completions")), "url_mismatch", "url"),
        (as_bytes(request(url=["/v1/completions"])), "invalid_url", "url"),
        (as_bytes(request(url="../../etc/passwd")), "invalid_url", "url"),
        (as_bytes(request(body=None)), "missing_required_parameter", "body"),
        (as_bytes(request(body=[])), "invalid_value", "body"),
        (as_bytes(request(body={"stream": True})), "invalid_value", "body.stream"),
        (as_bytes(request(body={"background": True})), "invalid_value", "body.background"),
        (as_bytes(request(body={"model": ["demo"]})), "invalid_value", "body.model"),
    ],
    ids=range(22),
)
def test_refused_lines(data: bytes, code: str, param: str | None):
    with pytest.raises(LineRefused) as caught:
        parse(data, 3, SETTINGS, (CHAT,))
    error = caught.value.as_error()
    assert (error["code"], error["param"], error["line"]) == (code, param, 3)
    assert "Line 3" in error["message"]
    assert len(error["message"]) < 400


def checked(tmp_path: Path, *found: Any, **more: Any) -> lines.CheckedFile:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\n".join(as_bytes(line) for line in found))
    return check_file(path, SETTINGS, CHAT, **more)


def test_a_file_is_checked_as_a_whole(tmp_path: Path):
    good = checked(tmp_path, *(request(f"{i}") for i in range(5)))
    assert (good.total, good.model, good.errors) == (5, "demo", ())


@pytest.mark.parametrize(
    "found, code, line",
    [
        ([], "empty_file", None),
        ([request("a"), request("a")], "duplicate_custom_id", 2),
        ([request("a"), request("b", body={"model": "other"}), request("c")], "model_mismatch", 2),
        ([request("a"), request("b", body={})], "model_mismatch", 2),
        ([request("a"), request("b"), request("c"), request("d")], "too_many_tasks", 4),
    ],
)
def test_files_that_cannot_be_batches(tmp_path: Path, found: list[Any], code: str, line: int | None):
    (error,) = checked(tmp_path, *found, max_lines=3).errors
    assert (error.code, error.line) == (code, line)


def test_no_more_errors_than_somebody_reads(tmp_path: Path):
    assert len(checked(tmp_path, *([{}] * 100), max_errors=7).errors) == 7


def answers(found: list[Line], settings: Settings) -> list[dict[str, Any]]:
    """Output lines from an application that listens nowhere."""
    app = create_app(settings)

    async def run() -> list[dict[str, Any]]:
        async with app.router.lifespan_context(app):
            server_of(app).inference.decoders.start()
            replies = await asyncio.gather(*(lines.answer(app, line, settings) for line in found))
            return [
                json.loads(lines.output_line(line.custom_id, reply))
                for line, reply in zip(found, replies, strict=True)
            ]

    return asyncio.run(run())


def test_answers_without_a_socket(own_store: Path):
    chat = parse(as_bytes(request("a")), 1, SETTINGS)
    text = parse(as_bytes(request("b", url="/v1/completions", body={"prompt": "Hi", "max_tokens": 2})), 2, SETTINGS)
    response = parse(
        as_bytes(request("c", url="/v1/responses", body={"input": "Hi", "max_output_tokens": 16})), 3, SETTINGS
    )
    wrong = parse(as_bytes(request("d", body={"messages": "none"})), 4, SETTINGS)
    found = answers([chat, text, response, wrong], Settings(port=0, api_key="secret and long enough"))
    assert [line["custom_id"] for line in found] == ["a", "b", "c", "d"]
    assert [line["response"]["status_code"] for line in found] == [200, 200, 200, 400]
    assert [line["error"] for line in found] == [None] * 4
    assert len({line["id"] for line in found} | {line["response"]["request_id"] for line in found}) == 8
    bodies = [line["response"]["body"] for line in found]
    assert [body.get("object") for body in bodies] == ["chat.completion", "text_completion", "response", None]
    assert bodies[2]["store"] is False
    assert bodies[3]["error"]["type"] == "invalid_request_error"


def test_a_failure_of_the_application_is_an_answer():
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("of no concern to clients")

    reply = asyncio.run(lines.answer(broken, Line(1, "a", CHAT, {}), SETTINGS))
    found = json.loads(lines.output_line("a", reply))
    assert found["response"]["status_code"] == 500
    assert "concern" not in json.dumps(found)
