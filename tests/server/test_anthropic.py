"""Anthropic's messages API: translation both ways, and its own client against a running server."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from edge_runtime.messages import ImagePart, parse_messages
from edge_runtime.server.anthropic_replies import MessageEvents, whole_message
from edge_runtime.server.anthropic_requests import MessagesRequest
from edge_runtime.server.errors import RequestError
from server.conftest import SIGN, Served
from server.made_answers import CALLING, THOUGHTFUL, made_answer
from server.test_openai_replies import unknown_fields

EVENT = TypeAdapter(RawMessageStreamEvent)
PICTURE = base64.b64encode(SIGN.read_bytes()).decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}


def asked(content: Any = "Hi", **fields: Any) -> MessagesRequest:
    body = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": content}], **fields}
    return MessagesRequest.model_validate(body)


def test_a_conversation():
    request = asked(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "Weather there?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "redacted_thinking", "data": "xyz"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "1", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "sunny"}]},
                    {"type": "text", "text": "So?"},
                ],
            },
        ],
    )
    system, user, assistant, tool, last = parse_messages(request.conversation())
    assert system.parts == ("Be brief.",)
    assert isinstance(user.parts[0], ImagePart)
    assert user.parts[1] == "Weather there?"
    assert (assistant.reasoning, assistant.parts) == ("Hm.", ("Let me see.",))
    assert assistant.tool_calls[0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert (tool.role, tool.parts, last.role, last.parts) == ("tool", ("sunny",), "user", ("So?",))


def test_options():
    request = asked(
        temperature=0.5,
        top_k=3,
        stop_sequences=["END"],
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 5},
    )
    assert request.options() == {
        "max_tokens": 9,
        "temperature": 0.5,
        "top_k": 3,
        "stop": ["END"],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": TOOL["input_schema"]}}],
        "tool_choice": "required",
        "thinking": True,
        "thinking_budget": 5,
    }
    assert request.most_calls == 1
    named = asked(tools=[TOOL], tool_choice={"type": "tool", "name": "weather"}, thinking={"type": "disabled"})
    assert (named.options()["tool_choice"], named.options()["thinking"], named.most_calls) == ("weather", False, None)


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"type": "image"},
        {"type": "image", "source": {"type": "file", "file_id": "1"}},
        {"type": "image", "source": {"type": "url", "url": "/etc/passwd"}},
        {"type": "image", "source": {"type": "base64", "media_type": "a;b", "data": "AAAA"}},
        {"type": "document", "source": {"type": "base64", "data": None}},
        {"type": "text"},
        {"type": "tool_use", "name": "a", "input": "{}"},
        {"type": "tool_result", "content": 5},
        {"type": "tool_result", "content": [5]},
        {"type": "thinking"},
        {"type": ["text"]},
    ],
)
def test_blocks_of_the_wrong_form_are_named(block):
    with pytest.raises(RequestError) as error:
        asked([{"type": "text", "text": "a"}, block]).conversation()
    assert error.value.param.startswith("messages[0].content[1]")


def test_tools_of_anthropics_own_are_refused():
    for fields in ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, {"tool_choice": {"type": "tool"}}):
        with pytest.raises(RequestError):
            asked(**fields).options()


def events_of(pieces: Any, most_calls: int | None = None) -> list[Any]:
    events = MessageEvents("demo", most_calls)
    found = [*events.begin(20, 5)]
    for piece in pieces:
        found += events.piece(piece)
    found += events.end(made_answer(pieces))
    parsed = [EVENT.validate_json(json.dumps(event), strict=True) for event in found]
    assert not unknown_fields(parsed)
    return parsed


def test_events():
    events = events_of(THOUGHTFUL)
    assert [event.type for event in events] == [
        "message_start",
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_delta"),
        "content_block_stop",
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert [event.index for event in events if hasattr(event, "index")] == [0] * 5 + [1] * 4
    assert (events[-2].delta.stop_reason, events[-2].usage.output_tokens) == ("end_turn", 9)
    called = events_of(CALLING)
    assert [event.content_block.type for event in called if event.type == "content_block_start"] == [
        "text",
        "tool_use",
        "tool_use",
    ]
    assert called[-2].delta.stop_reason == "tool_use"
    assert sum(event.type == "content_block_start" for event in events_of(CALLING, 1)) == 2


def test_a_whole_reply():
    reply = Message.model_validate_json(json.dumps(whole_message(made_answer(THOUGHTFUL), "demo")), strict=True)
    assert not unknown_fields(reply)
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert (reply.usage.input_tokens, reply.usage.cache_read_input_tokens) == (15, 5)
    called = Message.model_validate(whole_message(made_answer(CALLING), "demo", most_calls=1))
    assert [block.type for block in called.content] == ["text", "tool_use"]
    assert (called.content[1].input, called.stop_reason) == ({"city": "Örebro"}, "tool_use")
    cut = whole_message(made_answer(THOUGHTFUL, finish_reason="length"), "demo")
    assert cut["stop_reason"] == "max_tokens"


@pytest.fixture
def claude(server: Served) -> Iterator[anthropic.Anthropic]:
    plain = anthropic.DefaultHttpxClient(trust_env=False)
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, http_client=plain) as client:
        yield client


def test_its_own_client(claude):
    question: Any = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What does it say?"}]}]
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


HELLO: Any = [{"role": "user", "content": "Who are you?"}]
GREEDY = {"temperature": 0}


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
        "messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Read it to me."}]}],
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
        with pytest.raises(anthropic.BadRequestError, match="blanks"):
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
    assert [reply.status_code for reply in replies] == [200, 200, 404, 400, 400, 200, 405, 501, 403]
    assert len({*ids}) == len(ids)
    assert all(name.startswith("req_") for name in ids)


def test_batches_are_refused_by_a_sentence(claude):
    asked: Any = [{"custom_id": "1", "params": {"model": "demo", "max_tokens": 5, "messages": HELLO}}]
    batches = claude.messages.batches
    for ask in (
        batches.list,
        lambda: batches.create(requests=asked),
        lambda: batches.retrieve("msgbatch_1"),
        lambda: batches.cancel("msgbatch_1"),
        lambda: batches.delete("msgbatch_1"),
    ):
        with pytest.raises(anthropic.APIStatusError, match="keeps no batches") as error:
            ask()
        assert error.value.status_code == 501


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
            "input_schema": TOOL["input_schema"] | {"additionalProperties": False},
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


CITY: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_call(claude, choice):
    asked: Any = {"model": "demo", "max_tokens": 200, "messages": HELLO, "tools": [CITY, TOOL | {"name": "now"}]}
    asked |= {"tool_choice": choice | {"disable_parallel_tool_use": True}, "extra_body": GREEDY}
    reply = claude.messages.create(**asked)
    (call,) = [block for block in reply.content if block.type == "tool_use"]
    assert reply.stop_reason == "tool_use"
    assert call.name in ("weather", "now")
    assert choice["type"] == "any" or call.name == "weather"
    assert call.input.get("city") in ("Rome", "Oslo", None)
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [(block.name, block.input) for block in final.content] == [(call.name, call.input)]
    assert final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}, IMAGE]}
    turns = [*HELLO, {"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(
        model="demo", max_tokens=20, messages=turns, tools=[CITY], tool_choice={"type": "none"}
    )
    assert after.stop_reason in ("end_turn", "max_tokens")


def test_tools_that_run_by_themselves(claude):
    """The package calls functions and sends their results until it has had enough."""
    asked_for = []

    @anthropic.beta_tool
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """The weather of a city.

        Args:
            city: Which one.
        """
        asked_for.append(city)
        return "sunny"

    runner = claude.beta.messages.tool_runner(
        model="demo", max_tokens=200, messages=HELLO, tools=[weather], tool_choice={"type": "any"}, max_iterations=2
    )
    replies = [*runner]
    assert [reply.stop_reason for reply in replies] == ["tool_use"] * 2
    assert len(asked_for) == 2
    assert {*asked_for} <= {"Rome", "Oslo"}


def test_a_call_or_an_answer_in_form(claude):
    form = {
        "type": "json_schema",
        "schema": {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"]},
    }
    asked: Any = {
        "model": "demo",
        "max_tokens": 100,
        "messages": HELLO,
        "tools": [CITY],
        "output_config": {"format": form},
    }
    (block,) = claude.messages.create(**asked).content
    assert block.type == "tool_use" or json.loads(block.text) == {"a": "b"}
