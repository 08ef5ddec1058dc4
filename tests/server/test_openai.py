"""The `openai` package against a running server; every reply and event is read by its types, strictly."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image

from edge_runtime.server.settings import Settings
from server.asked import ANSWER, CLOCK, HELLO, PICTURE, PROMPT, QUESTION, URI, WEATHER, Sign
from server.conftest import Served, openai_client, running
from server.test_openai_replies import read, read_text_chunk
from server.test_responses_events import checked, read_response


@pytest.fixture(scope="module")
def tiny_server(own_store: Path, exact_folder: Path) -> Iterator[Served]:
    """A server with a model that knows the tags of tool calls, if nothing else."""
    with running(Settings(port=0, models=(str(exact_folder),), heartbeat_s=0.05, load={"exact": True})) as served:
        yield served


@pytest.fixture
def tiny(tiny_server: Served) -> Iterator[openai.OpenAI]:
    """A client of that model, which takes requests without a name, too."""
    with openai_client(tiny_server) as client:
        yield client


@pytest.fixture
def tiny_name(tiny_server: Served) -> str:
    """What the model is called."""
    return tiny_server.state.catalog.default


def events_of(reply: httpx.Response) -> list[str]:
    """Data of a stream of server-sent events."""
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("spelling", ["object", "string"])
def test_a_question_about_a_picture(ai, spelling):
    part = PICTURE if spelling == "object" else {"type": "image_url", "image_url": URI}
    messages: Any = [{"role": "user", "content": [part, QUESTION[0]["content"][1]]}]
    raw = ai.chat.completions.with_raw_response.create(model="demo", messages=messages, temperature=0)
    reply = read(ChatCompletion, json.loads(raw.text))
    assert reply.choices[0].message.content == "CAFE"
    assert reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert 0 < usage.prompt_tokens_details.image_tokens < usage.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert raw.parse().choices[0].message.content == "CAFE"


def test_low_detail_is_one_slice(ai):
    wide = io.BytesIO()
    Image.new("RGB", (400, 120), "navy").save(wide, "PNG")
    url = "data:image/png;base64," + base64.b64encode(wide.getvalue()).decode()

    def tokens(**detail: str) -> int:
        part = {"type": "image_url", "image_url": {"url": url, **detail}}
        reply = ai.chat.completions.create(model="demo", messages=[{"role": "user", "content": [part]}], max_tokens=1)
        return reply.usage.prompt_tokens

    assert tokens(detail="low") < tokens() == tokens(detail="high")


def test_a_stream_of_chunks(client):
    body = {"model": "demo", "messages": QUESTION, "temperature": 0, "stream": True}
    reply = client.post("/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}})
    *found, done = events_of(reply)
    assert done == "[DONE]"
    chunks = [read(ChatCompletionChunk, json.loads(line)) for line in found]
    first, *deltas, finish, usage = chunks
    assert first.choices[0].delta.model_dump(exclude_unset=True) == {"role": "assistant", "content": ""}
    assert "".join(chunk.choices[0].delta.content for chunk in deltas) == "CAFE"
    assert (finish.choices[0].delta.model_dump(exclude_unset=True), finish.choices[0].finish_reason) == ({}, "stop")
    assert (usage.choices, usage.usage.completion_tokens > 0) == ([], True)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert "usage" not in json.loads(events_of(client.post("/v1/chat/completions", json=body))[0])


def test_the_packages_own_stream(ai):
    with ai.chat.completions.stream(model="demo", messages=HELLO, temperature=0) as stream:
        told = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert told == final.choices[0].message.content == ANSWER


def test_signs_of_life_are_no_chunks(client):
    """While a picture is encoded comments are sent, which every client of server-sent events skips."""
    body = {"messages": QUESTION, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert {line.partition(" ")[0] for line in lines} <= {"data:", ":"}


def test_several_answers(ai):
    reply = ai.chat.completions.create(model="demo", messages=HELLO, n=3, seed=7, temperature=0)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {ANSWER}
    one = ai.chat.completions.create(model="demo", messages=HELLO, temperature=0)
    assert reply.usage.prompt_tokens == one.usage.prompt_tokens, "the prompt counts once"
    assert reply.usage.completion_tokens == 3 * one.usage.completion_tokens


def test_several_answers_in_a_stream(ai):
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in ai.chat.completions.create(model="demo", messages=HELLO, n=2, temperature=0, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason
    assert (texts, ends) == ({0: ANSWER, 1: ANSWER}, {0: "stop", 1: "stop"})


def test_log_probabilities(ai):
    options: Any = {"model": "demo", "messages": HELLO, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    raw = ai.chat.completions.with_raw_response.create(**options)
    tokens = read(ChatCompletion, json.loads(raw.text)).choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == ANSWER
    assert all(token.top_logprobs[0].token == token.token for token in tokens), "the most probable was taken"
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
    streamed = [
        token
        for chunk in ai.chat.completions.create(**options, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_sampling_is_passed_on(ai):
    def answer(**options: Any) -> Any:
        return ai.chat.completions.create(model="demo", messages=HELLO, temperature=0, **options).choices[0]

    first_token = answer(logprobs=True).logprobs.content[0]
    assert first_token.token == "I"
    assert answer(stop=" tiny").message.content == "I am a"
    assert answer(max_tokens=2).finish_reason == "length"
    assert answer(max_completion_tokens=3, max_tokens=1).message.content == "I am a"
    assert answer(logit_bias={"40": -100}).message.content != ANSWER


def test_seeds_repeat_answers(tiny, tiny_name):
    """Of a model in float32: with quantised weights, logits depend a little on what was computed before."""
    warm: Any = {"messages": HELLO, "model": tiny_name, "temperature": 5.0, "top_p": 1, "max_tokens": 8}
    seeded = [tiny.chat.completions.create(**warm, seed=seed).choices[0].message.content for seed in (1, 1, 2, -3)]
    assert seeded[0] == seeded[1] != seeded[2]


def test_reasoning_has_both_names(ai, client):
    options: Any = {"model": "demo", "messages": HELLO, "max_tokens": 60}
    reply = ai.chat.completions.create(**options, reasoning_effort="low")
    message: Any = reply.choices[0].message
    assert message.reasoning == message.reasoning_content
    assert message.reasoning
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0
    quiet: Any = ai.chat.completions.create(
        **options, extra_body={"chat_template_kwargs": {"enable_thinking": False}}, reasoning_effort="high"
    )
    assert "reasoning" not in quiet.choices[0].message.model_extra
    lines = events_of(client.post("/v1/chat/completions", json=options | {"stream": True, "reasoning_effort": "low"}))
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    assert any(delta.get("reasoning") for delta in deltas)
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)


def test_a_schema_is_kept(ai):
    reply = ai.chat.completions.parse(model="demo", messages=HELLO, response_format=Sign)
    assert isinstance(reply.choices[0].message.parsed, Sign)
    options: Any = {"model": "demo", "messages": HELLO, "max_tokens": 40}
    some = ai.chat.completions.create(**options, response_format={"type": "json_object"})
    assert isinstance(json.loads(some.choices[0].message.content), dict)


def test_a_schema_after_reasoning(ai):
    options: Any = {"model": "demo", "messages": HELLO, "reasoning_effort": "low", "max_tokens": 120}
    reply: Any = ai.chat.completions.parse(**options, response_format=Sign)
    assert isinstance(reply.choices[0].message.parsed, Sign)
    assert reply.choices[0].message.reasoning


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called(tiny, tiny_name, choice):
    options: Any = {"model": tiny_name, "messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
    raw = tiny.chat.completions.with_raw_response.create(**options)
    (told,) = read(ChatCompletion, json.loads(raw.text)).choices
    assert (told.finish_reason, told.message.content) == ("tool_calls", None)
    (call,) = told.message.tool_calls
    assert call.function.name == "weather"
    assert 1 <= json.loads(call.function.arguments)["days"] <= 9
    with tiny.chat.completions.stream(**options) as stream:
        for event in stream:
            assert event
        (final,) = stream.get_final_completion().choices
    assert final.finish_reason == "tool_calls"
    assert 1 <= json.loads(final.message.tool_calls[0].function.arguments)["days"] <= 9


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_the_demo_can_be_made_to_call(ai, client, choice):
    """Its vocabulary has the tags of calls, so that the wire formats can be tried with it; it has not learnt them."""
    options: Any = {"model": "demo", "messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 60}
    (told,) = ai.chat.completions.create(**options).choices
    assert (told.finish_reason, told.message.content) == ("tool_calls", None)
    deltas = [
        json.loads(line)["choices"]
        for line in events_of(client.post("/v1/chat/completions", json={**options, "stream": True}))[:-1]
    ]
    calls = [call for (choice,) in deltas for call in choice["delta"].get("tool_calls", [])]
    assert [(call["index"], call["type"], call["function"]["name"]) for call in calls] == [(0, "function", "weather")]
    for arguments in (told.message.tool_calls[0].function.arguments, calls[0]["function"]["arguments"]):
        assert 1 <= json.loads(arguments)["days"] <= 9
    assert deltas[-1][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_responses_of_the_demo_can_be_made_to_call(ai, choice):
    tool: Any = {"type": "function", "strict": False, **WEATHER["function"]}
    options: Any = {"model": "demo", "input": "Hi", "tools": [tool], "tool_choice": choice, "max_output_tokens": 60}
    raw = ai.responses.with_raw_response.create(**options)
    (call,) = read_response(json.loads(raw.text)).output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    with ai.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert "response.function_call_arguments.done" in kinds
    for item in (call, streamed):
        assert 1 <= json.loads(item.arguments)["days"] <= 9
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    previous = json.loads(raw.text)["id"]
    told = ai.responses.create(model="demo", input=[result], previous_response_id=previous, max_output_tokens=4)
    assert told.output[-1].type == "message"


def test_usage_of_streamed_answers_is_the_first_ones(client):
    """Whichever ends first: the other answers find the prompt in the cache."""
    told = set()
    for seed in range(0, 60, 10):
        words = f"{seed} entirely new question number {seed} about shapes and colours, answer with a word or two"
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": words}],
            "n": 3,
            "seed": seed,
            "max_tokens": 20,
        }
        lines = events_of(
            client.post(
                "/v1/chat/completions",
                json={**body, "temperature": 1.5, "stream": True} | {"stream_options": {"include_usage": True}},
            )
        )
        chunks = [json.loads(line) for line in lines[:-1]]
        order = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        usage = chunks[-1]["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"] - 10, order
        told.add(order[0])
    assert told != {0}, "in none of these did another one end first"


def test_results_of_tools_go_back(tiny, tiny_name):
    options: Any = {"model": tiny_name, "tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": 80}
    called = tiny.chat.completions.create(**options, messages=HELLO).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"}
    messages: Any = [*HELLO, called.model_dump(exclude_none=True), result]
    reply = tiny.chat.completions.create(**options | {"tool_choice": "none", "max_tokens": 3}, messages=messages)
    assert not reply.choices[0].message.tool_calls


@pytest.mark.parametrize("stream", [False, True])
def test_completions(ai, client, stream):
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "logprobs": 1, "temperature": 0, "n": 2}
    if not stream:
        raw = ai.completions.with_raw_response.create(**body, echo=True)
        given = json.loads(raw.text)
        for choice in given["choices"]:  # null, as OpenAI sent it, which the type does not allow
            assert choice["logprobs"]["token_logprobs"].pop(0) is None
            assert choice["logprobs"]["top_logprobs"].pop(0) is None
        reply = read(Completion, given)
        assert [choice.index for choice in reply.choices] == [0, 1]
        assert reply.choices[0].text == PROMPT + "I am a tiny"
        offsets = reply.choices[0].logprobs.text_offset
        assert (offsets[0], offsets[-4]) == (0, len(PROMPT))
        assert len(offsets) == reply.usage.prompt_tokens + 4
        assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 8)
        return
    *lines, done = events_of(client.post("/v1/completions", json=body | {"stream": True}))
    chunks = [read_text_chunk(json.loads(line)) for line in lines]
    assert done == "[DONE]"
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    whole = client.post("/v1/completions", json=body).json()
    assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert list(ai.completions.create(**body, stream=True))[-1].choices[0].finish_reason in ("stop", "length")


def test_several_prompts(ai):
    prompts = [PROMPT, PROMPT.replace("Who are you", "Hello")]
    reply = ai.completions.create(model="demo", prompt=prompts, max_tokens=4, temperature=0)
    each = [ai.completions.create(model="demo", prompt=one, max_tokens=4, temperature=0) for one in prompts]
    assert [choice.text for choice in reply.choices] == [one.choices[0].text for one in each]
    assert reply.choices[0].text == "I am a tiny"
    assert reply.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in each)
    with pytest.raises(openai.BadRequestError) as error:
        ai.completions.create(model="demo", prompt=prompts, stream=True)
    assert error.value.param == "prompt"


OF_OTHER_CLIENTS = {"aliases", "architecture", "created_at", "display_name", "meta", "tags", "type"}
"""What Anthropic's and llama-server's clients read of an entry in the list of models."""


def test_models(ai, client):
    listed = ai.models.list()
    assert "demo" in [model.id for model in listed]
    for entry in client.get("/v1/models").json()["data"]:
        others = {*entry} - {*Model.model_fields}
        read(Model, {name: value for name, value in entry.items() if name not in others})
        assert others == OF_OTHER_CLIENTS
    assert ai.models.retrieve("demo").id == ai.models.retrieve("demo:latest").id == "demo"
    with pytest.raises(openai.NotFoundError) as error:
        ai.models.retrieve("org/unknown")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="unknown", messages=HELLO)


def test_a_response(ai):
    content = [{"type": "input_image", "image_url": URI}, {"type": "input_text", "text": "What does it say?"}]
    options: Any = {"model": "demo", "input": [{"role": "user", "content": content}], "temperature": 0}
    raw = ai.responses.with_raw_response.create(**options)
    reply = read_response(json.loads(raw.text))
    assert (reply.output_text, reply.status) == ("CAFE", "completed")
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    follow: Any = [*options["input"], *reply.output, {"role": "user", "content": "Who are you?"}]
    again = ai.responses.create(model="demo", input=follow, temperature=0)
    assert again.usage.input_tokens > reply.usage.input_tokens + reply.usage.output_tokens
    assert again.usage.input_tokens_details.cached_tokens > reply.usage.input_tokens / 2, "the picture was kept"


def test_a_streamed_response(ai, client):
    body: Any = {"model": "demo", "input": "Who are you?", "temperature": 0}
    lines = events_of(client.post("/v1/responses", json=body | {"stream": True}))
    events = [checked(json.loads(line)) for line in lines]
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert events[-1].response.output_text == ANSWER
    with ai.responses.stream(**body) as stream:
        told = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert told == stream.get_final_response().output_text == ANSWER


def test_a_response_with_reasoning_and_a_schema(ai):
    options: Any = {"model": "demo", "input": "Who are you?", "max_output_tokens": 120}
    reply = ai.responses.parse(**options, reasoning={"effort": "low"}, text_format=Sign)
    assert isinstance(reply.output_parsed, Sign)
    assert [item.type for item in reply.output] == ["reasoning", "message"]
    assert reply.usage.output_tokens_details.reasoning_tokens > 0
    cut = ai.responses.create(**options | {"max_output_tokens": 1})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_response_that_calls_a_tool(tiny, tiny_name):
    options: Any = {
        "model": tiny_name,
        "input": "Weather?",
        "tools": [{"type": "function", **WEATHER["function"], "strict": True}],
        "tool_choice": "required",
    }
    reply = tiny.responses.create(**options)
    (call,) = reply.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    with tiny.responses.stream(**options) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        (again,) = stream.get_final_response().output
    assert json.loads(done[0].arguments) == json.loads(again.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    follow: Any = [{"role": "user", "content": "Weather?"}, *reply.output, result]
    assert tiny.responses.create(model=tiny_name, input=follow, max_output_tokens=3).output
