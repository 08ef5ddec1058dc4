"""Answers of the engine → replies that openai-python's types read, strictly and with no field they do not know."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from edge_runtime.generation.text_stream import Piece
from edge_runtime.server.openai.replies import ChatChunks, TextCompletions, add_usage, chat_completion, usage
from server.made_answers import CALLING, SCORED, THOUGHTFUL, made_answer, scored

REASONING = {"reasoning", "reasoning_content"}
TIMINGS = {"timings"}  # llama-server's, in whole replies and in the last chunk of a stream


def unknown_fields(parsed: Any) -> set[str]:
    """Names of all fields, at any depth, that the types do not have."""
    if isinstance(parsed, list):
        return {name for item in parsed for name in unknown_fields(item)}
    if not isinstance(parsed, BaseModel):
        return set()
    inner = [unknown_fields(getattr(parsed, name)) for name in type(parsed).model_fields]
    return set(parsed.model_extra or {}).union(*inner)


def read(kind: type[BaseModel], reply: Any) -> Any:
    parsed = kind.model_validate_json(json.dumps(reply), strict=True)
    assert unknown_fields(parsed) <= REASONING | TIMINGS
    return parsed


def test_a_whole_reply():
    reply = read(ChatCompletion, chat_completion([made_answer(THOUGHTFUL), made_answer(SCORED)], "demo"))
    first, second = reply.choices
    assert (reply.model, [first.index, second.index]) == ("demo", [0, 1])
    assert (first.message.content, first.finish_reason, first.logprobs) == ("A dog.", "stop", None)
    assert first.message.reasoning == first.message.reasoning_content == "Hmm."
    assert [token.token for token in second.logprobs.content] == ["A ", "dog", "."], "those of the answer alone"
    assert second.logprobs.content[0].top_logprobs[1].logprob == -1.5
    assert reply.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 20,
        "completion_tokens": 18,
        "total_tokens": 38,
        "prompt_tokens_details": {"cached_tokens": 5, "image_tokens": 8},
        "completion_tokens_details": {
            "reasoning_tokens": 6,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }, "the prompt once, the answers together"


def test_calls():
    choice = read(ChatCompletion, chat_completion([made_answer(CALLING)], "demo")).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    weather, now = choice.message.tool_calls
    assert (weather.type, weather.function.name, json.loads(weather.function.arguments)) == (
        "function",
        "weather",
        {"city": "Örebro"},
    )
    assert (now.function.name, now.function.arguments) == ("now", "{}")
    assert weather.id != now.id
    reply = read(ChatCompletion, chat_completion([made_answer(CALLING[1:])], "demo", max_calls=1))
    assert len(reply.choices[0].message.tool_calls) == 1
    assert reply.choices[0].message.content is None


@pytest.mark.parametrize(("reason", "told"), [("stop", "stop"), ("length", "length"), ("repetition", "length")])
def test_why_an_answer_ended(reason, told):
    reply = chat_completion([made_answer(THOUGHTFUL, finish_reason=reason)], "demo")
    assert reply["choices"][0]["finish_reason"] == told
    cut = chat_completion([made_answer(CALLING, finish_reason=reason)], "demo")
    assert cut["choices"][0]["finish_reason"] == ("tool_calls" if reason == "stop" else "length")


def streamed(chunks: ChatChunks, *answers: Any) -> list[Any]:
    found = [*chunks.begin()]
    for number, pieces in enumerate(answers):
        for piece in pieces:
            found += chunks.piece(number, piece)
        found.append(chunks.end(number, made_answer(pieces)))
    found += chunks.usage([made_answer(pieces) for pieces in answers])
    return [read(ChatCompletionChunk, chunk) for chunk in found]


def test_chunks_come_in_order():
    chunks = streamed(ChatChunks("demo", include_usage=True), THOUGHTFUL)
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks[:-1]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning": "Hm", "reasoning_content": "Hm"},
        {"reasoning": "m.", "reasoning_content": "m."},
        {"content": "A "},
        {"content": "dog."},
        {},
    ]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 5 + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 6
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 29)
    assert len({chunk.id for chunk in chunks}) == 1


def test_no_usage_unless_asked_for():
    chunks = streamed(ChatChunks("demo"), THOUGHTFUL)
    assert not any("usage" in chunk.model_fields_set for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chunks_of_calls():
    chunks = streamed(ChatChunks("demo", n=2), CALLING, THOUGHTFUL)
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather"), (1, "now")]
    ends = {chunk.choices[0].index: chunk.choices[0].finish_reason for chunk in chunks}
    assert ends == {0: "tool_calls", 1: "stop"}
    assert [chunk.choices[0].index for chunk in chunks[:2]] == [0, 1], "each answer says who speaks"
    one = streamed(ChatChunks("demo", max_calls=1), CALLING)
    assert sum(len(chunk.choices[0].delta.tool_calls or []) for chunk in one) == 1


def test_chunks_with_log_probabilities():
    chunks = streamed(ChatChunks("demo"), SCORED)
    scores = [chunk.choices[0].logprobs for chunk in chunks]
    tokens = [[token.token for token in score.content] for score in scores if score is not None]
    assert tokens == [["A "], ["dog", "."]], "none of the reasoning's"


TORN = [("😀🚀 é", [b"\xf0\x9f", b"\x98\x80", b"\xf0\x9f\x9a", b"\x80 ", b"\xc3", b"\xa9"], [0, 0, 1, 1, 3, 3])]


@pytest.mark.parametrize(("text", "parts", "offsets"), TORN)
def test_offsets_stay_in_the_text(text, parts, offsets):
    """Characters may come in several tokens; the place of each is where its first complete character is."""
    scores = [replace(scored("a"), token=part.decode("utf-8", "replace"), bytes=[*part]) for part in parts]
    answer = made_answer([Piece(text, "answer", tuple(scores))])
    texts = TextCompletions("demo")
    (choice,) = texts.whole([answer], ["Say: "], usage([answer]))["choices"]
    assert choice["logprobs"]["text_offset"] == [5 + at for at in offsets]
    assert choice["logprobs"]["tokens"][0] == "bytes:\\xf0\\x9f", "unlike the other half of it"
    texts.echoed = ["Say: "]
    [*texts.begin()]
    chunks = [chunk for score in scores for chunk in texts.piece(0, Piece("", "answer", (score,)))]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [logprobs["text_offset"] for logprobs in streamed] == [[5 + at] for at in offsets]


def test_log_probabilities_of_a_prompt():
    first = replace(scored("Say"), logprob=math.nan, top_logprobs=[])
    answer = replace(made_answer(SCORED[1:]), end_logprobs=scored("<|im_end|>"))
    texts = TextCompletions("demo", n_top=2)
    reply = texts.whole([answer], ["Say: "], usage([answer]), {0: [first, scored(": ")]})
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Say", ": ", "A ", "dog", ".", "<|im_end|>"]
    assert logprobs["token_logprobs"] == [None, *[-0.5] * 5], "nothing precedes the first"
    assert logprobs["top_logprobs"][:2] == [None, {": ": -0.5, "no": -1.5}]
    assert logprobs["text_offset"] == [0, 3, 5, 7, 10, 11]
    assert json.loads(json.dumps(reply, allow_nan=False))


def test_times_are_told_as_llama_server_does():
    answer = made_answer(THOUGHTFUL, timings_s={"prefill": 0.5, "decode": 2.0})
    told = chat_completion([answer], "demo")["timings"]
    assert (told["cache_n"], told["prompt_n"], told["predicted_n"]) == (5, 15, 9)
    assert (told["prompt_per_second"], told["prompt_per_token_ms"]) == (30.0, 500 / 15)
    assert (told["predicted_per_second"], told["predicted_per_token_ms"]) == (4.0, 250.0), "over eight steps"
    assert ChatChunks("demo").end(0, answer)["timings"] == told, "without usage, the last chunk has it"
    assert "timings" not in ChatChunks("demo", include_usage=True).end(0, answer)
    for few in (0, 1):
        short = made_answer([], completion_tokens=few, timings_s={"decode": 0.1})
        assert chat_completion([short], "demo")["timings"]["predicted_per_second"] == 0


def test_completions():
    texts = TextCompletions("demo", n_top=2)
    answers = [made_answer(SCORED[1:]), made_answer([], finish_reason="length")]
    total = add_usage([usage([answer]) for answer in answers])
    reply = read(Completion, texts.whole(answers, ["Say: ", ""], total))
    first, second = reply.choices
    assert (first.text, first.finish_reason, second.text, second.finish_reason) == (
        "Say: A dog.",
        "stop",
        "",
        "length",
    )
    assert first.logprobs.tokens == ["A ", "dog", "."]
    assert first.logprobs.text_offset == [5, 7, 10]
    assert first.logprobs.top_logprobs[1] == {"dog": -0.5, "no": -1.5}
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (40, 58)


def test_a_stream_of_completions():
    texts = TextCompletions("demo", include_usage=True)
    answer = made_answer(SCORED)
    texts.echoed = ["Say: "]
    chunks = [*texts.begin()]
    for piece in SCORED:
        chunks += texts.piece(0, piece)
    chunks += [texts.end(0, answer)]
    chunks += texts.usage([answer])
    parsed = [read_text_chunk(chunk) for chunk in chunks]
    assert [choice.text for chunk in parsed for choice in chunk.choices] == ["Say: ", "A ", "dog.", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert parsed[2].choices[0].logprobs.text_offset == [7, 10]
    assert (parsed[-1].choices, parsed[-1].usage.total_tokens) == ([], 29)


def read_text_chunk(chunk: Any) -> Completion:
    """Only the last chunk has a reason; the others have null, as OpenAI sends it, which the type does not allow."""
    given = json.loads(json.dumps(chunk))
    for choice in given["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    return read(Completion, given)
