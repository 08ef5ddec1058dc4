"""Programs that speak Ollama's API: LangChain and llm themselves, the others as they are known to ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from typing import Any

import ollama
import pytest

from server.asked import SIGN_BASE64 as PICTURE
from server.conftest import SIGN


@pytest.fixture
def asked(server):
    """LangChain's model with options of the test's own; its connections are closed at the end."""
    from langchain_ollama import ChatOllama

    with contextlib.ExitStack() as stack:

        def ask(**options: Any) -> ChatOllama:
            setup = {"validate_model_on_init": True, "client_kwargs": {"trust_env": False}, "temperature": 0}
            model = ChatOllama(model="demo", base_url=server.url, **{**setup, **options})
            assert model._client is not None
            stack.callback(model._client.close)
            return model

        yield ask


def test_langchain(asked):
    from langchain_core.messages import HumanMessage

    model = asked()
    parts: list[str | dict[Any, Any]] = [
        {"type": "text", "text": "What does it say?"},
        {"type": "image_url", "image_url": f"data:image/png;base64,{PICTURE}"},
    ]
    reply = model.invoke([HumanMessage(parts)])
    assert reply.content == "CAFE"
    assert reply.response_metadata["done_reason"] == "stop"
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["input_tokens"] > 64
    assert "".join(str(chunk.content) for chunk in model.stream([HumanMessage(parts)])) == "CAFE"
    schema = {
        "title": "Sign",
        "type": "object",
        "properties": {"word": {"enum": ["CAFE", "EXIT"]}},
        "required": ["word"],
    }
    found = model.with_structured_output(schema, method="json_schema").invoke([HumanMessage(parts)])
    assert isinstance(found, dict)
    assert found["word"] in ("CAFE", "EXIT")
    thoughts = asked(num_predict=12, reasoning=True, temperature=0.7, seed=1).invoke([HumanMessage(parts)])
    assert thoughts.additional_kwargs["reasoning_content"]


@pytest.mark.parametrize("arguments", [(), ("--no-stream",)])
def test_llm_with_its_ollama_plugin(server, tmp_path, arguments):
    environment = {**os.environ, "OLLAMA_HOST": server.url, "LLM_USER_PATH": str(tmp_path), "NO_PROXY": "127.0.0.1"}

    def llm(*words: str) -> str:
        command = [sys.executable, "-W", "ignore", "-m", "llm", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "ollama/demo:latest" in llm("models")
    answer = llm(
        "-m", "ollama/demo:latest", "-a", str(SIGN), "-o", "temperature", "0", "What does it say?", *arguments
    )
    assert answer == "CAFE\n"


def test_what_dify_asks(client):
    """Credentials: the prompt `ping` with num_predict 5. Chats stream; `think` is a bool, `format` a schema."""
    options = {
        "num_predict": 5,
        "temperature": 0.1,
        "top_p": 0.9,
        "top_k": 40,
        "num_ctx": 4096,
        "repeat_penalty": 1.1,
    }
    ping = {"model": "demo", "options": options, "stream": False, "messages": [{"role": "user", "content": "ping"}]}
    reply = client.post("/api/chat", json=ping, timeout=(10, 300))
    assert reply.status_code == 200
    assert {"message", "prompt_eval_count", "eval_count"} <= reply.json().keys()
    reply = client.post(
        "/api/generate", json={"model": "demo", "options": options, "stream": False, "prompt": "ping"}
    )
    assert reply.json()["done"] is True

    question = {"role": "user", "content": "What does it say?", "images": [PICTURE]}
    schema = {"type": "object", "properties": {"word": {"enum": ["CAFE", "EXIT"]}}, "required": ["word"]}
    body = {"model": "demo", "stream": True, "messages": [question], "options": {"temperature": 0}}
    texts = []
    with client.stream("POST", "/api/chat", json={**body, "think": False, "keep_alive": "5m"}) as stream:
        for line in stream.iter_lines():  # Dify skips empty lines, and takes a line without `message` for an error
            found = json.loads(line)
            texts.append(found["message"]["content"])
    assert "".join(texts) == "CAFE"
    assert found["prompt_eval_count"] < 500, "the picture's base64 is not counted as text"
    reply = client.post("/api/chat", json={**body, "stream": False, "format": schema})
    assert json.loads(reply.json()["message"]["content"])["word"] in ("CAFE", "EXIT")


def test_what_open_webui_asks(client):
    """It looks around first, then chats under the name with `:latest`, and asks for titles without a stream."""
    version = client.get("/api/version").json()["version"]
    assert tuple(map(int, version.partition("-")[0].split("."))) >= (0, 6, 4)
    assert client.get("/").text == "Ollama is running" == client.get("/", headers={"accept": "*/*"}).text
    assert client.head("/").status_code == 200
    (model,) = [model for model in client.get("/api/tags").json()["models"] if model["model"] == "demo:latest"]
    assert {"name", "model", "modified_at", "size", "digest", "details", "capabilities"} <= model.keys()
    assert len(model["digest"]) == 64
    client.post("/api/chat", json={"model": "demo", "keep_alive": "5m"})
    assert [each["model"] for each in client.get("/api/ps").json()["models"]] == ["demo:latest"]
    for key in ("name", "model"):
        assert "vision" in client.post("/api/show", json={key: "demo:latest"}).json()["capabilities"]
    embedded = client.post("/api/embed", json={"model": "demo:latest", "input": ["text"], "truncate": True})
    assert (embedded.status_code, list(embedded.json())) == (400, ["error"])
    body = {
        "model": "demo:latest",
        "messages": [{"role": "user", "content": "What does it say?", "images": [PICTURE]}],
        "options": {"temperature": 0, "num_ctx": 2048},
        "stream": True,
        "keep_alive": "5m",
        "metadata": {"chat_id": "x"},
    }
    told = [json.loads(line) for line in client.post("/api/chat", json=body).text.splitlines()]
    assert "".join(line["message"]["content"] for line in told) == "CAFE"
    assert told[-1]["eval_count"] > 0
    title = client.post("/api/generate", json={"model": "demo:latest", "prompt": "Title?", "stream": False})
    assert title.json()["done"] is True


LOOK = {
    "type": "function",
    "function": {
        "name": "HassTurnOn",
        "description": "Turns on a device",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": []},
    },
}


def test_what_home_assistant_asks(server):
    """Streams always, and sends back what came: no content beside calls, and results without a name."""

    async def talk() -> list[str]:
        client = ollama.AsyncClient(server.url, trust_env=False)
        options = {"num_ctx": 8192, "temperature": 0}  # the latter for the test alone
        messages = [
            ollama.Message(role="system", content="You are a voice assistant."),
            ollama.Message(role="user", content="What does it say?", images=[ollama.Image(value=SIGN)]),
        ]
        whole = await client.chat(model="demo", messages=messages, options=options)
        found = [whole["message"]["content"]]
        for keep, tools in ((-1, None), ("30s", [LOOK])):
            stream = await client.chat(
                model="demo",
                messages=messages,
                tools=tools,
                stream=True,
                keep_alive=keep,
                options=options,
                think=False,
                format=None,
            )
            parts = [part async for part in stream]
            assert all(part["message"].get("content") is not None for part in parts)
            found.append("".join(part["message"]["content"] for part in parts))
        function = ollama.Message.ToolCall.Function(name="HassTurnOn", arguments={"name": "lamp"})
        messages += [
            ollama.Message(role="assistant", tool_calls=[ollama.Message.ToolCall(function=function)]),
            ollama.Message(role="tool", content='{"data": {"success": true}, "error": null}'),
        ]
        schema = {
            "type": "object",
            "properties": {"word": {"type": "string", "enum": ["CAFE"]}},
            "required": ["word"],
        }
        stream = await client.chat(
            model="demo", messages=messages, stream=True, keep_alive="300s", options=options, format=schema
        )
        found.append("".join([part["message"]["content"] async for part in stream]))
        await client._client.aclose()
        return found

    whole, plain, _, formed = asyncio.run(talk())
    assert plain == whole != ""
    assert json.loads(formed) == {"word": "CAFE"}


def test_what_frigate_asks(server):
    """Looks whether the model is there; describes pictures by /api/generate; asks with tools in one piece."""
    with ollama.Client(host=server.url, timeout=60, headers=None, trust_env=False) as client:
        assert client.show("demo").get("error") is None
        assert "demo:latest" in [
            model.get("name", model.get("model", "")) for model in client.list().get("models", [])
        ]
        options = {"temperature": 0, "repeat_penalty": 1.05, "presence_penalty": 0.3}
        schema = {"type": "object", "properties": {"word": {"enum": ["CAFE"]}, "n": {"type": "integer"}}}
        result = client.generate(
            "demo",
            "What does it say?",
            images=[SIGN.read_bytes()],
            options=options,
            format={**schema, "required": ["word", "n"]},
        )
        assert json.loads(result["response"])["word"] == "CAFE"
        assert result.get("done_reason") in ("stop", "length")
        call = {"function": {"name": "HassTurnOn", "arguments": {}}}
        reply = client.chat(
            model="demo",
            messages=[
                {"role": "user", "content": "What happened?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "Nothing.", "tool_call_id": "call_1", "name": "HassTurnOn"},
            ],
            tools=[LOOK],
            options={**options, "num_predict": 8},
        )
        assert reply.get("done") is True
        assert isinstance(reply["message"].get("content"), str)
