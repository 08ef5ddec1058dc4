"""A server with tools in every chat: the second chat, and the first after a restart, begin with their own words."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from many_tools import many_tools
from server.test_serve_command import process

SYSTEM = {"role": "system", "content": "You help with notes and calendars, in short sentences. " * 4}


def ask(url: str, question: str, tools: list[dict[str, Any]]) -> tuple[int, int]:
    """Tokens of the prompt, and those of them that were computed."""
    messages = [SYSTEM, {"role": "user", "content": question}]
    body = {"model": "demo", "messages": messages, "tools": tools, "max_tokens": 2}
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        reply = client.post("/v1/chat/completions", json={**body, "stream": False})
        assert reply.status_code == 200, reply.text
        usage = reply.json()["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]


def test_after_a_restart_a_new_chat_computes_its_own_words_alone(tmp_path: Path) -> None:
    tools = many_tools()[:4]  # as many as the demo's context has room for
    with process(tmp_path, "-m", "demo") as (child, url):
        total, first = ask(url, "What is on my list?", tools)
        _, second = ask(url, "Where was I?", tools)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    assert first > 0.9 * total > 1000
    assert second <= 0.05 * first
    assert [*(tmp_path / "cache").glob("*.entry")]
    assert all(path.stat().st_mode & 0o077 == 0 for path in [tmp_path / "cache", *(tmp_path / "cache").iterdir()])
    with process(tmp_path, "-m", "demo") as (child, url):
        _, third = ask(url, "Who wrote to me?", tools)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0
    assert third <= 0.15 * first


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    tools = many_tools()[:2]
    for _ in range(2):
        with process(tmp_path, "-m", "demo", "--no-cache-dir") as (child, url):
            total, computed = ask(url, "What is on my list?", tools)
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0
        assert computed > 0.9 * total
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
def test_where_tools_are_off_a_request_with_tools_is_refused(serve, path: str) -> None:
    served = serve(tools="off")
    tools: list[Any] = many_tools()[:1]
    if path == "/v1/messages":
        function = tools[0]["function"]
        tools = [{"name": function["name"], "input_schema": function["parameters"]}]
    limit: dict[str, Any] = {"options": {"num_predict": 2}} if path == "/api/chat" else {"max_tokens": 2}
    body = {"model": "demo", "messages": [{"role": "user", "content": "ab"}], "stream": False, **limit}
    with httpx.Client(base_url=served.url, timeout=120, trust_env=False) as client:
        assert client.post(path, json=body).status_code == 200
        reply = client.post(path, json={**body, "tools": tools})
        assert reply.status_code == 400
        assert re.search("does not support tools", json.dumps(reply.json()))
