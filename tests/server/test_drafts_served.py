"""Guessed tokens over HTTP: OpenAI's `prediction`, `drafts`, the usage, the timings and the metrics."""

from __future__ import annotations

import re
from typing import Any

import httpx
import openai
import pytest

from edge_runtime import Model
from edge_runtime.engine import drafts as drafts_module
from server.asked import HELLO

LONG: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def forced(monkeypatch) -> None:
    """Check every guess, whatever it costs."""
    monkeypatch.setattr(drafts_module, "draft_length", lambda draft, *_: len(draft.tokens))


def ask(ai: openai.OpenAI, **options: Any) -> Any:
    extra = LONG["extra_body"] | options.pop("extra_body", {})
    return ai.chat.completions.create(model="demo", messages=HELLO, **LONG | options | {"extra_body": extra})


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_prediction(ai, server, forced, in_parts):
    plain = ask(ai, extra_body={"drafts": "off"})
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert "draft_n" not in plain.timings
    text = plain.choices[0].message.content
    content: Any = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}] if in_parts else text
    reply = ask(ai, prediction={"type": "content", "content": content})
    assert reply.choices[0].message.content == text
    details = reply.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 10
    assert details.rejected_prediction_tokens >= 0
    assert reply.timings["draft_n_accepted"] >= details.accepted_prediction_tokens
    metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
    found = re.findall(
        r'edge_runtime_draft_tokens_total\{model="demo",result="accepted",source="expected"\} (\S+)', metrics
    )
    assert float(found[0]) >= details.accepted_prediction_tokens


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"prediction": {"type": "text", "content": "x"}}, "prediction.type"),
        ({"prediction": {"type": "content", "content": 5}}, "prediction.content"),
        ({"prediction": "x"}, "prediction"),
        ({"drafts": "always"}, "drafts is 'always'"),
        ({"drafts": ["suffix", "magic"]}, "drafts is"),
    ],
)
def test_what_is_refused(ai, wrong, what):
    with pytest.raises(openai.BadRequestError, match=what):
        ask(ai, extra_body=wrong)


def test_a_remote_engine_sends_both(server, forced):
    with Model.connect(server.url) as model:
        first = model.chat("Hello", greedy=True, max_tokens=12, drafts="off")
        again = model.chat("Hello", greedy=True, max_tokens=12, expected_text=str(first) or "x")
    assert str(first) == str(again)
