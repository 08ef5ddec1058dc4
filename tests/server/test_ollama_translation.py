"""What /api/chat and /api/generate make of answers whose pieces are known: a scripted model instead of a real one."""

from __future__ import annotations

import base64
import datetime
import json
import threading
from typing import Any

import httpx
import ollama
import pytest

from edge_runtime.engine.events import Progress
from edge_runtime.errors import EngineBusy, ImageError, MessageError, PromptTooLongError
from edge_runtime.generation.text_stream import Piece
from edge_runtime.inputs.workers.pool import ClientsDecoders
from edge_runtime.server.registry import loaded as models
from edge_runtime.server.settings import Settings
from edge_runtime.structured_output.tools import ToolCall
from server.conftest import SIGN
from server.scripted import TIMES, ScriptedModel, finished, say

HELLO = [{"role": "user", "content": "Hello"}]
CALL = Piece("<tool_call>...</tool_call>", "tool_call", call=ToolCall("weather", {"place": "Rome", "days": 2}))
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def scripted(serve, monkeypatch):
    """Start a server whose model follows a script; returns the model and a client."""
    clients = []

    def start(script: Any, **settings: Any) -> tuple[ScriptedModel, httpx.Client]:
        model = ScriptedModel(script)
        monkeypatch.setattr(models, "Model", lambda paths, options: model)
        client = httpx.Client(base_url=serve(**settings).url, timeout=30, trust_env=False)
        clients.append(client)
        return model, client

    yield start
    for client in clients:
        client.close()


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/api/chat", json={"model": "demo", "messages": HELLO, **fields})


def lines(reply: httpx.Response) -> list[dict[str, Any]]:
    """Every line of a stream; none of them is empty."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.text.removesuffix("\n").split("\n")]


def test_every_line_of_a_stream(scripted):
    _, client = scripted([Piece("Well", "reasoning"), Piece("Ha", "answer"), Piece("llo", "answer"), finished()])
    *pieces, last = lines(chat(client))
    assert [line["message"] for line in pieces] == [
        {"role": "assistant", "content": "", "thinking": "Well"},
        {"role": "assistant", "content": "Ha"},
        {"role": "assistant", "content": "llo"},
    ]
    assert all(set(line) == {"model", "created_at", "message", "done"} and line["done"] is False for line in pieces)
    assert all(datetime.datetime.fromisoformat(line["created_at"]).tzinfo for line in [*pieces, last])
    assert last["message"] == {"role": "assistant", "content": ""}
    assert (last["done"], last["done_reason"]) == (True, "stop")
    assert (last["prompt_eval_count"], last["eval_count"]) == (11, 3)
    assert last["prompt_eval_duration"] == (0.25 + TIMES["encode"] + TIMES["prefill"]) * 1e9
    assert last["eval_duration"] == TIMES["decode"] * 1e9
    assert 0 < last["total_duration"] < 30e9


def test_generate_has_its_own_fields(scripted):
    _, client = scripted([Piece("Well", "reasoning"), Piece("Hallo", "answer"), finished("length")])
    whole = client.post("/api/generate", json={"model": "demo", "prompt": "Hello", "stream": False}).json()
    assert (whole["response"], whole["thinking"], whole["done_reason"]) == ("Hallo", "Well", "length")
    *pieces, last = lines(client.post("/api/generate", json={"model": "demo", "prompt": "Hello"}))
    assert [(line["response"], line.get("thinking")) for line in pieces] == [("", "Well"), ("Hallo", None)]
    assert last["response"] == ""


def test_tool_calls_are_objects(scripted):
    model, client = scripted([CALL, finished()])
    with ollama.Client(str(client.base_url), trust_env=False) as api:
        whole = api.chat("demo", HELLO, tools=[TOOL])
        (call,) = whole.message.tool_calls
        assert (call.function.name, call.function.arguments) == ("weather", {"place": "Rome", "days": 2})
        assert whole.message.content == ""
        chunks = [*api.chat("demo", HELLO, tools=[TOOL], stream=True)]
        assert [bool(chunk.message.tool_calls) for chunk in chunks] == [True, False]
        result = {"role": "tool", "tool_name": "weather", "content": "18 degrees"}
        api.chat("demo", [*HELLO, whole.message, result], tools=[TOOL])
    messages, options = model.asked[-1]
    assert options["tools"][0]["function"]["name"] == "weather"
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"place": "Rome", "days": 2}
    assert messages[2]["content"] == "18 degrees"


def test_what_is_asked_of_the_model(scripted):
    model, client = scripted(say("x"))
    options = {
        "temperature": 0.5,
        "top_k": 40.0,
        "repeat_penalty": 1.2,
        "num_predict": 5,
        "stop": "x",
        "num_ctx": 4096,
    }
    chat(client, options={**options, "seed": -1, "mirostat": 2}, think="low", logprobs=True, top_logprobs=3)
    asked = model.asked[-1][1]
    assert isinstance(asked.pop("decoders"), ClientsDecoders)
    assert asked.pop("pixel_limit") > 1_000_000
    assert asked.pop("video_limits").most_bytes == asked.pop("file_limit_bytes") > 1_000_000
    assert asked.pop("page_limit") == Settings().max_pages == 100
    assert asked == {
        "temperature": 0.5,
        "top_k": 40,
        "repetition_penalty": 1.2,
        "max_tokens": 5,
        "stop": ["x"],
        "thinking": True,
        "thinking_budget": 256,
        "logprobs": True,
        "top_logprobs": 3,
        "context_shift": True,
    }
    chat(client, options={"num_predict": -1, "repeat_last_n": 0}, format={"type": "object"}, think=False)
    asked = model.asked[-1][1]
    assert (asked["max_tokens"], asked["repetition_penalty"], asked["schema"]) == (32768, 1.0, {"type": "object"})
    assert "thinking" not in asked
    chat(client, format=json.dumps({"type": "string"}))
    assert model.asked[-1][1]["schema"] == {"type": "string"}


def test_signs_of_life_while_a_picture_is_encoded(scripted):
    """Valid lines with empty content, never empty lines; each tells how far the work is."""
    seen = threading.Event()
    _, client = scripted([Progress("encode", 1, 4, 0.25), seen, Piece("Hi", "answer"), finished()])
    with client.stream("POST", "/api/chat", json={"model": "demo", "messages": HELLO}) as reply:
        told = []
        for line in reply.iter_lines():
            told.append(json.loads(line))
            if len(told) == 3:
                seen.set()
    beats = told[: [line["message"]["content"] for line in told].index("Hi")]
    assert len(beats) >= 3
    assert all(line["message"] == {"role": "assistant", "content": ""} and not line["done"] for line in beats)
    assert beats[-1]["progress"] == {"stage": "encode", "done": 1, "total": 4, "share": 0.25}
    with ollama.Client(str(client.base_url), trust_env=False) as api:
        assert "".join(part.message.content for part in api.chat("demo", HELLO, stream=True)) == "Hi"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MessageError("The message is odd."), 400),
        (ImageError("The picture cannot be decoded."), 400),
        (PromptTooLongError("The prompt has 9000 tokens."), 400),
        (EngineBusy("64 requests are waiting."), 429),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_errors_before_an_answer(scripted, error, status, stream):
    def fail(messages: Any, **options: Any) -> list[Any]:
        raise error

    _, client = scripted(fail)
    reply = chat(client, stream=stream)
    assert (reply.status_code, reply.json()) == (status, {"error": str(error)})
    assert ("retry-after" in reply.headers) == (status == 429)


def test_errors_in_the_middle_of_a_stream(scripted, caplog):
    _, client = scripted([Piece("Ha", "answer"), RuntimeError("secret: where the models lie")])
    first, last = lines(chat(client))
    assert first["message"]["content"] == "Ha"
    assert list(last) == ["error"]
    assert "secret" not in last["error"]
    assert "secret: where the models lie" in caplog.text
    with (
        ollama.Client(str(client.base_url), trust_env=False) as api,
        pytest.raises(ollama.ResponseError, match="went wrong inside the server"),
    ):
        [*api.chat("demo", HELLO, stream=True)]


def test_who_hangs_up_ends_the_work(scripted):
    never = threading.Event()
    model, client = scripted([Piece("Ha", "answer"), never, finished()])
    with client.stream("POST", "/api/chat", json={"model": "demo", "messages": HELLO}) as reply:
        next(reply.iter_lines())
    assert model.running[-1].cancelled.wait(10)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/api/chat", json={"model": "demo", "messages": HELLO, "stream": False}, timeout=0.3)
    assert model.running[-1].cancelled.wait(10)
    never.set()


def test_loading_and_leaving(scripted):
    model, client = scripted(say("x"))
    for path, content in (
        ("chat", {"message": {"role": "assistant", "content": ""}}),
        ("generate", {"response": ""}),
    ):
        loaded = client.post(f"/api/{path}", json={"model": "demo", "keep_alive": "10m"}).json()
        assert {key: loaded[key] for key in content} == content
        assert (loaded["done"], loaded["done_reason"]) == (True, "load")
        (running,) = client.get("/api/ps").json()["models"]
        expires = datetime.datetime.fromisoformat(running["expires_at"]) - datetime.datetime.now(datetime.UTC)
        assert 590 < expires.total_seconds() < 601
        assert len(running["expires_at"].partition(".")[2]) <= len("123456+00:00")
        left = client.post(f"/api/{path}", json={"model": "demo", "keep_alive": 0}).json()
        assert (left["done"], left["done_reason"]) == (True, "unload")
        assert client.get("/api/ps").json() == {"models": []}
    assert model.closed.is_set()
    assert not model.asked


def test_a_model_leaves_after_its_time(scripted):
    model, client = scripted(say("x"), keep_alive_s=0.2)
    chat(client)
    assert len(client.get("/api/ps").json()["models"]) == 1
    assert model.closed.wait(10)
    chat(client, keep_alive=-1)
    (running,) = client.get("/api/ps").json()["models"]
    assert running["expires_at"] > "2300"
    for value, status in ((True, 400), ("soon", 400), ("1h30m", 200), ("-1m", 200), (1.5, 200), ("", 200)):
        assert chat(client, keep_alive=value).status_code == status, value


def test_a_model_that_stays_beyond_any_date_is_listed(scripted):
    """Dates end with the year 9999, and timers before."""
    _, client = scripted(say("x"))
    for value in (1e12, 1e300, 10**30, "99999999999h", "1000000h30m", "1e3", -1e300):
        reply = chat(client, keep_alive=value, stream=False)
        assert reply.status_code == (400 if value == "1e3" else 200), value
        (running,) = client.get("/api/ps").json()["models"]
        stays = datetime.datetime.fromisoformat(running["expires_at"]) - datetime.datetime.now(datetime.UTC)
        assert stays.days > 3000, value


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": "hello"}, "messages: Input should be a valid list"),
    ({"messages": [{"role": "king", "content": "x"}]}, "role 'king'"),
    ({"messages": [{"role": "user", "content": "x", "images": ["/etc/passwd"]}]}, "no files"),
    ({"messages": [{"role": "user", "content": "x", "images": ["aGFsbG8gaGFsbG8gaGFsbG8="]}]}, "not a picture"),
    ({"messages": HELLO, "think": "deeply"}, "think is 'deeply'"),
    ({"messages": HELLO, "format": 5}, "format is neither"),
    ({"messages": HELLO, "options": {"top_k": 1.5}}, "whole number"),
    ({"messages": HELLO, "options": {"seed": "a"}}, "expected a number"),
    ({"messages": HELLO, "options": {"stop": 5}}, "stop is not a list"),
    ({"messages": HELLO, "options": {"temperature": -1}}, "temperature is -1"),
    ({"messages": HELLO, "format": {"type": "strange"}}, "strange"),
    ({"messages": HELLO, "tools": [{}]}, "Tool 0 has no name"),
    ({"messages": HELLO, "top_logprobs": 30, "logprobs": True}, "from 0 to 20"),
]


@pytest.mark.parametrize(("fields", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_requests_that_are_wrong(client, fields, reason):
    reply = client.post("/api/chat", json={"model": "demo", **fields})
    assert (reply.status_code, list(reply.json())) == (400, ["error"]), reply.text
    assert reason in reply.json()["error"]


@pytest.mark.parametrize("body", [b"{", b"[]", b"", b"null", b"\xff", b'{"model": ' + b"[" * 50_000])
def test_bodies_that_are_no_requests(client, body):
    reply = client.post("/api/chat", content=body)
    assert (reply.status_code, list(reply.json())) == (400, ["error"]), reply.text
    assert reply.json()["error"]


def test_json_by_any_name(client):
    """Curl says that it sends a form, some clients say nothing."""
    body = json.dumps(
        {"model": "demo", "messages": [{"role": "user", "content": "x"}], "options": {"num_predict": 1}}
    )
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}, {}):
        assert client.post("/api/chat", content=body, headers=headers).status_code == 200


def test_data_uris_are_taken_too(client):
    """Dify's users send the prefix that Ollama refuses."""
    picture = "data:image/png;base64," + base64.b64encode(SIGN.read_bytes()).decode()
    question = {"role": "user", "content": "What does it say?", "images": [picture]}
    reply = client.post("/api/chat", json={"model": "demo", "messages": [question], "stream": False})
    assert reply.json()["message"]["content"] == "CAFE"
