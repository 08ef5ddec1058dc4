"""Anthropic's messages API by its own client, against a running server."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
import httpx
import pytest
from pydantic import BaseModel, Field

from server.asked import ANTHROPIC_TOOL, BLOCK, GREEDY, HELLO


def test_its_own_client(claude):
    question: Any = [{"role": "user", "content": [BLOCK, {"type": "text", "text": "What does it say?"}]}]
    options: Any = {"model": "demo", "max_tokens": 20, "messages": question, "extra_body": {"temperature": 0}}
    reply = claude.messages.create(**options)
    assert [block.text for block in reply.content] == ["CAFE"]
    assert reply.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model="demo", messages=question)
    assert counted.input_tokens == reply.usage.input_tokens + reply.usage.cache_read_input_tokens
    with claude.messages.stream(
        model="demo", max_tokens=20, messages=question, extra_body={"temperature": 0}
    ) as stream:
        assert "".join(stream.text_stream) == "CAFE"
        assert stream.get_final_message().usage.output_tokens == reply.usage.output_tokens


def test_reasoning_and_mistakes(claude):
    hello: Any = [{"role": "user", "content": "Who are you?"}]
    thinking: Any = {"type": "enabled", "budget_tokens": 10}
    reply = claude.messages.create(model="demo", max_tokens=60, messages=hello, thinking=thinking)
    assert reply.content[0].type == "thinking"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="unknown", max_tokens=5, messages=hello)
    with pytest.raises(anthropic.BadRequestError) as error:
        claude.messages.create(model="demo", max_tokens=-1, messages=hello)
    assert error.value.body["error"]["type"] == "invalid_request_error"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Word(BaseModel):
    word: Literal["red", "green"]


class Shapes(BaseModel):
    """Lists, nested models, limits, and what may be missing."""

    names: list[Literal["square", "circle"]] = Field(min_length=2, max_length=3, description="Of shapes.")
    share: float = Field(gt=0, lt=1)
    initials: str = Field(min_length=2, max_length=2)
    word: Word
    note: Literal["x"] | None = None


@pytest.mark.parametrize("kind", [Word, Cat, Shapes])
def test_answers_are_parsed_into_models(claude, kind):
    asked: Any = {"model": "demo", "max_tokens": 200, "messages": HELLO, "output_format": kind}
    reply = claude.messages.parse(**asked)
    assert isinstance(reply.parsed_output, kind)
    assert isinstance(claude.beta.messages.parse(**asked).parsed_output, kind)
    with claude.messages.stream(**asked) as stream:
        assert isinstance(stream.get_final_message().parsed_output, kind)


def test_a_schema_that_cannot_be_kept_is_refused_by_its_place(claude):
    form = {
        "type": "json_schema",
        "schema": {"type": "object", "properties": {"a": {"type": "integer", "not": {"multipleOf": 2}}}},
    }
    for fields, name in (
        ({"output_config": {"format": form}}, "output_config.format"),
        ({"output_format": form}, "output_format"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=name):
            claude.messages.create(model="demo", max_tokens=50, messages=HELLO, extra_body=fields)


def test_tokens_are_told_before_the_answer(claude):
    """What a stream begins with is what it ends with, and what a whole reply and the counter say."""
    asked: Any = {
        "model": "demo",
        "messages": [{"role": "user", "content": [BLOCK, {"type": "text", "text": "Read it to me."}]}],
    }
    counted = claude.messages.count_tokens(**asked).input_tokens
    for _ in range(2):  # the second time most of the prompt is known
        events = [*claude.messages.create(**asked, max_tokens=20, stream=True, extra_body=GREEDY)]
        started, ended = events[0].message.usage, events[-2].usage
        for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            assert getattr(started, name) == getattr(ended, name)
        assert started.input_tokens + started.cache_read_input_tokens == counted
    whole = claude.messages.create(**asked, max_tokens=20, extra_body=GREEDY).usage
    assert whole == started.model_copy(update={"output_tokens": ended.output_tokens})
    assert whole.cache_read_input_tokens > 0


def test_which_stop_sequence_was_met(claude):
    asked: Any = {"model": "demo", "max_tokens": 40, "messages": HELLO, "extra_body": GREEDY}
    reply = claude.messages.create(**asked, stop_sequences=["model", " demo", "never"])
    assert (reply.stop_reason, reply.stop_sequence, reply.content[0].text) == (
        "stop_sequence",
        " demo",
        "I am a tiny",
    )
    with claude.messages.stream(**asked, stop_sequences=[" "]) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence, final.content[0].text) == ("stop_sequence", " ", "I")
    assert claude.messages.create(**asked, stop_sequences=["never"]).stop_sequence is None


def test_an_answer_that_was_begun_is_gone_on_with(claude):
    asked: Any = {"model": "demo", "max_tokens": 40, "extra_body": GREEDY}
    begun = [*HELLO, {"role": "assistant", "content": "I am a tiny"}]
    assert claude.messages.create(**asked, messages=begun).content[0].text == " demo model."
    with claude.messages.stream(**asked, messages=begun) as stream:
        assert "".join(stream.text_stream) == " demo model."
    counted = claude.messages.count_tokens(model="demo", messages=begun).input_tokens
    assert counted > claude.messages.count_tokens(model="demo", messages=HELLO).input_tokens
    for wrong in ("I am ", "I am\n"):
        with pytest.raises(anthropic.BadRequestError, match="whitespace"):
            claude.messages.create(**asked, messages=[*HELLO, {"role": "assistant", "content": wrong}])


def test_a_prompt_is_read_without_an_answer(claude):
    asked: Any = {"model": "demo", "messages": [{"role": "user", "content": "Nobody has asked this before, has he?"}]}
    read = claude.messages.create(**asked, max_tokens=0)
    assert (read.content, read.stop_reason, read.usage.output_tokens) == ([], "max_tokens", 0)
    usage = claude.messages.create(**asked, max_tokens=1).usage
    assert usage.cache_read_input_tokens == read.usage.input_tokens + read.usage.cache_read_input_tokens - 1


def test_reasoning_that_is_not_to_be_shown(claude):
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    asked: Any = {"model": "demo", "max_tokens": 60, "messages": HELLO, "thinking": thinking, "extra_body": GREEDY}
    reply = claude.messages.create(**asked)
    assert (reply.content[0].type, reply.content[0].thinking) == ("thinking", "")
    events = [*claude.messages.create(**asked, stream=True)]
    assert not [
        event for event in events if event.type == "content_block_delta" and event.delta.type == "thinking_delta"
    ]


def test_every_reply_has_an_id(server):
    body = {"model": "demo", "max_tokens": 2, "messages": HELLO}
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        replies = [
            client.post("/v1/messages", json=body),
            client.post("/v1/messages", json=body | {"stream": True}),
            client.post("/v1/messages", json=body | {"model": "unknown"}),
            client.post("/v1/messages", json={}),
            client.post("/v1/messages", content="{"),
            client.post("/v1/messages/count_tokens", json={"messages": HELLO}),
            client.get("/v1/messages"),
            client.get("/v1/messages/batches"),
            client.post("/v1/messages", json=body, headers={"Host": "elsewhere.example"}),
        ]
    ids = [reply.headers["request-id"] for reply in replies]
    assert [reply.status_code for reply in replies] == [200, 200, 404, 400, 400, 200, 405, 200, 403]
    assert len({*ids}) == len(ids)
    assert all(name.startswith("req_") for name in ids)


def test_the_list_of_models(claude):
    models = [*claude.models.list()]
    assert "demo" in [model.id for model in models]
    assert claude.models.retrieve("demo").display_name == "demo"


def test_a_request_as_claude_code_sends_it(claude):
    """Many blocks of system prompt, marks for caches, tools, reasoning, and fields of every beta."""
    mark = {"type": "ephemeral", "ttl": "1h"}
    tools: Any = [
        {
            "name": name,
            "description": "Do it.",
            "input_schema": ANTHROPIC_TOOL["input_schema"] | {"additionalProperties": False},
        }
        for name in ("Bash", "Read", "TodoWrite")
    ]
    tools[-1]["cache_control"] = mark
    tools.append({**tools[0], "name": "Later", "defer_loading": True})
    reply = claude.beta.messages.create(
        model="demo",
        max_tokens=64,
        system=[{"type": "text", "text": f"Rule {i}.", "cache_control": mark} for i in range(4)],
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>a</system-reminder>"},
                    {"type": "text", "text": "Hi", "cache_control": mark},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "nothing", "is_error": True}
                ],
            },
        ],
        tools=tools,
        tool_choice={"type": "auto"},
        thinking={"type": "adaptive"},
        output_config={"effort": "medium"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": "user_1"},
        service_tier="auto",
        betas=["claude-code-20250219", "interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
    )
    assert reply.stop_reason in ("end_turn", "max_tokens", "tool_use")
    assert reply.usage.input_tokens > 100  # all of it was read; what the toy says to it may be nothing
