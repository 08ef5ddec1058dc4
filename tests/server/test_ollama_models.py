"""What models say that they can do, and what becomes of a request for more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.answers import TOY_NOTICE
from support.gguf_maker import BOOL, HIDDEN, I32, SPECIAL, STRING, VOCABULARY, mini_decoder, mini_mmproj

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"enum": ["Rome", "Oslo"]}}, "required": ["place"]},
    },
}
TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def _letters(n: int, more: list[str]) -> list[str]:
    """Tokens of text: what the tests say can be written with them."""
    return [*"abcdefghijklmnopqrstuvwxyzHĠĊ", *more][:n]


@pytest.fixture
def made(serve, tmp_path: Path):
    """Serve a model whose vocabulary has these special tokens; returns a client."""
    clients = []

    def make(*tags: str, toy: bool = False, template: str | None = None, **settings: Any) -> httpx.Client:
        file = mini_decoder()
        special = [token for token in SPECIAL if token not in TAGS]
        plain = [f"{letter}{i}" for i in range(10) for letter in "abcdefghijklmnopqrstuvwxyz"]
        n_plain = VOCABULARY - len(special) - len(tags)
        file.array("tokenizer.ggml.tokens", STRING, [*_letters(n_plain, plain), *tags, *special])
        file.array("tokenizer.ggml.token_type", I32, [1] * n_plain + [4] * len(tags) + [3] * len(special))
        file.array("tokenizer.ggml.merges", STRING, [])
        if toy:
            file.key("edge_runtime.toy", BOOL, 1)
        if template is not None:
            file.key("tokenizer.chat_template", STRING, template)
        folder = tmp_path / "made"
        folder.mkdir()
        (folder / "m.gguf").write_bytes(file.build())
        (folder / "mmproj-m.gguf").write_bytes(mini_mmproj(HIDDEN).build())
        served = serve(models=(str(folder),), **settings)
        clients.append(httpx.Client(base_url=served.url, timeout=60, trust_env=False))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def claimed(client: httpx.Client, name: str = "made") -> list[str]:
    shown = client.post("/api/show", json={"model": name}).json()["capabilities"]
    (listed,) = [each for each in client.get("/api/tags").json()["models"] if each["name"] == f"{name}:latest"]
    assert listed["capabilities"] == shown
    return shown[2:]


@pytest.mark.parametrize(
    ("tags", "settings", "expected"),
    [
        (TAGS, {}, ["tools", "thinking"]),
        (TAGS[:2], {}, ["tools"]),
        (TAGS[2:], {}, ["thinking"]),
        (TAGS[:1], {}, []),
        ((), {}, []),
        (TAGS, {"toy": True}, []),
        (TAGS, {"tools": "off"}, ["thinking"]),
        ((), {"template": "{{ tools }}{{ enable_thinking }}{{ messages[0].content }}"}, []),  # words are no proof
        (TAGS, {"template": "{{ messages[0].content }}"}, ["tools", "thinking"]),
    ],
)
def test_a_model_claims_what_its_vocabulary_can_do(made, tags, settings, expected):
    assert claimed(made(*tags, **settings)) == expected


def test_what_the_vocabulary_cannot_do_is_refused_in_ollamas_words(made):
    client = made()
    for body, words in (
        ({"tools": [TOOL]}, "registry.ollama.ai/library/made:latest does not support tools"),
        ({"think": True}, '"made" does not support thinking'),
        ({"think": "low"}, '"made" does not support thinking'),
    ):
        reply = client.post("/api/chat", json={"model": "made", "messages": HELLO, "stream": False, **body})
        assert (reply.status_code, list(reply.json())) == (400, ["error"])
        assert words in reply.json()["error"]
    openai = client.post("/v1/chat/completions", json={"model": "made", "messages": HELLO, "tools": [TOOL]})
    assert openai.status_code == 400
    assert "does not support tools" in openai.json()["error"]["message"]
    plain = {"model": "made", "messages": HELLO, "stream": False, "options": {"num_predict": 1}}
    for body in ({"think": False}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}, {"think": None}):
        assert client.post("/api/chat", json={**plain, **body}).status_code == 200


def test_tools_that_the_owner_has_switched_off(serve):
    served = serve(tools="off")
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        for path, more in (
            ("/api/chat", {}),
            ("/v1/chat/completions", {"max_tokens": 2}),
            ("/v1/messages", {"max_tokens": 2, "tools": [{"name": "x", "input_schema": {"type": "object"}}]}),
        ):
            reply = client.post(path, json={"model": "demo", "messages": HELLO, "tools": [TOOL], **more})
            assert reply.status_code == 400, reply.text
            assert "registry.ollama.ai/library/demo:latest does not support tools" in reply.text
            assert "--tools off" in reply.text
        answered = {"model": "demo", "messages": HELLO, "stream": False, "options": {"num_predict": 1}}
        assert client.post("/api/chat", json=answered).status_code == 200


def test_a_toy_says_so(client):
    (demo,) = [model for model in client.get("/api/tags").json()["models"] if model["name"] == "demo:latest"]
    assert demo["details"]["notice"] == TOY_NOTICE
    shown = client.post("/api/show", json={"model": "demo"}).json()
    assert shown["notice"] == shown["details"]["notice"] == TOY_NOTICE


def test_others_do_not(made):
    client = made(*TAGS)
    (listed,) = [model for model in client.get("/api/tags").json()["models"] if model["name"] == "made:latest"]
    assert "notice" not in listed["details"]
    assert "notice" not in client.post("/api/show", json={"model": "made"}).json()


# --- forced calls, and answers that go on --------------------------------------------------------------------------


def test_a_forced_call(client):
    body = {"model": "demo", "messages": HELLO, "tools": [TOOL], "options": {"temperature": 0}}
    for choice in ("required", "get_weather", {"type": "function", "function": {"name": "get_weather"}}):
        reply = client.post("/api/chat", json={**body, "tool_choice": choice, "stream": False}).json()
        (call,) = reply["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert call["function"]["arguments"]["place"] in ("Rome", "Oslo")
        lines = [
            json.loads(line)
            for line in client.post("/api/chat", json={**body, "tool_choice": choice}).text.splitlines()
        ]
        calls = [line["message"]["tool_calls"] for line in lines if line["message"].get("tool_calls")]
        assert calls == [[call]]
        assert "".join(line["message"]["content"] for line in lines) == reply["message"]["content"] == ""
    result = {"role": "tool", "tool_name": "get_weather", "content": "18 degrees"}
    again = {**body, "messages": [*HELLO, reply["message"], result], "stream": False}
    again["options"] = {"temperature": 0, "num_predict": 4}
    assert client.post("/api/chat", json=again).status_code == 200
    assert client.post("/api/chat", json={**body, "tools": [], "tool_choice": "required"}).status_code == 400
    assert client.post("/api/chat", json={**body, "tool_choice": "nothing"}).status_code == 400


def test_the_last_turn_of_the_assistant_is_continued(client, server):
    messages = [*HELLO, {"role": "assistant", "content": "I am the"}]
    options = {"temperature": 0, "num_predict": 6}
    base = {"model": "demo", "messages": messages, "stream": False, "options": options}
    counts = {}
    for word in (None, True, False):
        body = base if word is None else {**base, "continue_final_message": word}
        reply = client.post("/api/chat", json=body)
        assert reply.status_code == 200, reply.text
        assert not reply.json()["message"]["content"].startswith("I am the")
        counts[word] = reply.json()["prompt_eval_count"]
    assert counts[None] == counts[True] < counts[False]
    reply = client.post("/api/chat", json={**base, "messages": HELLO, "continue_final_message": True})
    assert (reply.status_code, list(reply.json())) == (400, ["error"])
