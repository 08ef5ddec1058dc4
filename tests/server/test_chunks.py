"""What streams tell of their own work, and prompts that are computed anew: llama-server's fields in all APIs."""

from __future__ import annotations

import itertools
import json
import time
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from edge_runtime.engine.events import Progress
from edge_runtime.generation.text_stream import Piece
from edge_runtime.server.inference import Answering
from edge_runtime.server.openai.chunks import ProgressReport

PATHS = ("/completion", "/v1/completions", "/chat/completions", "/v1/chat/completions", "/responses", "/v1/responses")


def asking(path: str, text: str, most: int = 20, **fields: Any) -> dict[str, Any]:
    """The body of a request for a route."""
    if path.endswith("responses"):
        return {"input": text, "max_output_tokens": most, **fields}
    if path.endswith("chat/completions"):
        return {"messages": [{"role": "user", "content": text}], "max_tokens": most, **fields}
    turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return {"prompt": turn, "max_tokens": most, **fields}


def streamed(client: httpx.Client, path: str, text: str, **fields: Any) -> list[dict[str, Any]]:
    reply = client.post(path, json=asking(path, text, stream=True, temperature=0, **fields))
    assert reply.status_code == 200, reply.text
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(chunk: dict[str, Any]) -> str:
    """What a chunk or an event adds to the answer."""
    if chunk.get("type") == "response.output_text.delta":
        return chunk["delta"]
    choice = (chunk.get("choices") or [{}])[0]
    return choice.get("text") or choice.get("delta", {}).get("content") or chunk.get("content") or ""


@pytest.mark.parametrize("path", PATHS)
def test_how_much_of_the_prompt_was_read(client, path):
    text = f"Nobody has asked this before on {path}. " * 10
    for _ in range(2):  # the second time most of it is known
        chunks = streamed(client, path, text, return_progress=True)
        told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
        assert told[0]["processed"] == told[0]["cache"]
        assert told[-1]["processed"] == told[-1]["total"]
        assert all(
            a["processed"] < b["processed"] and a["time_ms"] <= b["time_ms"] for a, b in itertools.pairwise(told)
        )
        kinds = {chunk.get("type", "response.in_progress") for chunk in chunks if "prompt_progress" in chunk}
        assert kinds == {"response.in_progress"}
    assert told[0]["cache"] == told[0]["total"] - 1
    assert not any("prompt_progress" in chunk for chunk in streamed(client, path, text))


@pytest.mark.parametrize("path", PATHS)
def test_each_piece_has_its_times(client, path):
    chunks = streamed(client, path, "Who are you?", timings_per_token=True)
    said = [chunk for chunk in chunks if text_of(chunk)]
    times = [chunk["timings"] for chunk in said]
    assert len(times) > 3
    assert all(a["predicted_n"] < b["predicted_n"] for a, b in itertools.pairwise(times))
    assert all(a["predicted_ms"] <= b["predicted_ms"] for a, b in itertools.pairwise(times))
    assert {each["prompt_n"] + each["cache_n"] for each in times} == {times[0]["prompt_n"] + times[0]["cache_n"]}
    last = [chunk["timings"] for chunk in chunks if "timings" in chunk][-1]
    assert last["predicted_n"] >= times[-1]["predicted_n"]
    assert last["prompt_n"] + last["cache_n"] == times[0]["prompt_n"] + times[0]["cache_n"]
    plain = streamed(client, path, "Who are you?")
    assert [text_of(chunk) for chunk in plain if text_of(chunk)] == [text_of(chunk) for chunk in said]
    assert not any("timings" in chunk for chunk in plain if text_of(chunk))
    assert "timings" in plain[-1]
    assert "timings" in client.post(path, json=asking(path, "Who are you?")).json()


def test_times_of_several_answers_are_their_own(client):
    chunks = streamed(client, "/v1/chat/completions", "Who are you?", n=2, timings_per_token=True)
    for index in range(2):
        own = [chunk for chunk in chunks if text_of(chunk) and chunk["choices"][0]["index"] == index]
        assert own[0]["timings"]["predicted_n"] <= 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_computed_anew_where_that_is_asked_for(client, path, stream):
    text = "Who has read this prompt before? " * 4

    def cached(**fields: Any) -> int:
        if stream:
            chunks = streamed(client, path, text, **fields)
            return [chunk["timings"] for chunk in chunks if "timings" in chunk][-1]["cache_n"]
        reply = client.post(path, json=asking(path, text, temperature=0, **fields)).json()
        return reply["timings"]["cache_n"]

    cached()
    assert cached() > 20
    assert cached(cache_prompt=True) > 20
    assert cached(cache_prompt=False) == 0
    assert cached(cache_prompt=None) > 20, "what was computed anew serves the next one"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/completion"])
@pytest.mark.parametrize("field", ["cache_prompt", "return_progress", "timings_per_token"])
def test_switches_are_true_or_false(client, path, field):
    reply = client.post(path, json=asking(path, "Hi", **{field: "no"}))
    assert reply.status_code == 400
    assert field in reply.json()["error"]["message"]


@pytest.mark.parametrize("field", ["cache_prompt", "return_progress", "timings_per_token"])
def test_an_api_that_has_no_such_switch_refuses_it(client, field):
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}], field: False}
    reply = client.post("/v1/messages", json=body)
    assert reply.status_code == 400
    assert field in reply.json()["error"]["message"]


def test_progress_is_told_once():
    steps = [
        Progress("encode", 0, 4, 0.0, 100, 20),
        Progress("encode", 2, 4, 0.5, 100, 20),
        Progress("prefill", 0, 80, 0.0, 100, 20),
        Progress("prefill", 40, 80, 0.5, 100, 20),
        Progress("prefill", 40, 80, 0.5, 100, 20),
        Progress("prefill", 80, 80, 1.0, 100, 20),
    ]
    answering = SimpleNamespace(reports_progress=True)
    report = ProgressReport(cast("Answering", answering), times=True)
    assert report.of_prompt(None) == {}
    found = [fields for step in steps if (fields := report.of_prompt(step))]
    assert [fields["prompt_progress"]["processed"] for fields in found] == [20, 60, 100]
    assert [fields["timings"]["prompt_n"] for fields in found] == [0, 40, 80]
    answering.reports_progress = False
    assert ProgressReport(cast("Answering", answering), times=True).of_prompt(steps[0]) == {}


def test_rates_are_of_what_was_made_until_then():
    answering = SimpleNamespace(progress=Progress("prefill", 80, 80, 1.0, 100, 20), reports_progress=False)
    report = ProgressReport(cast("Answering", answering), times=True)
    assert report.of_piece(0, Piece("a", "answer", n_tokens=1))["timings"]["predicted_per_second"] == 0
    time.sleep(0.01)
    times = report.of_piece(0, Piece("b", "answer", n_tokens=3))["timings"]
    assert (times["cache_n"], times["prompt_n"], times["predicted_n"]) == (20, 80, 3)
    assert times["predicted_ms"] >= 10
    assert times["predicted_per_second"] == pytest.approx(2e3 / times["predicted_ms"])
    assert report.of_piece(1, Piece("a", "answer", n_tokens=1))["timings"]["predicted_ms"] == 0
    assert ProgressReport(cast("Answering", answering), times=False).of_piece(0, Piece("a", "answer")) == {}


# --- two turns of the assistant's at the end -----------------------------------------------------------------------

TWO = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am"},
    {"role": "assistant", "content": "a tiny"},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/chat/completions/input_tokens", "/apply-template", "/v1/responses"]
)
def test_two_turns_to_go_on_with_are_refused(client, path, stream):
    body = {"input": TWO} if path == "/v1/responses" else {"messages": TWO}
    reply = client.post(path, json={**body, "stream": stream})
    assert reply.status_code == 400, reply.text
    assert "Cannot have 2 or more assistant messages at the end of the list" in reply.json()["error"]["message"]
    if path != "/v1/responses":
        last = client.post(path, json={**body, "continue_final_message": True})
        assert last.status_code == 200, last.text
    assert client.post(path, json={name: [*turns, TWO[0]] for name, turns in body.items()}).status_code == 200


def test_ollama_and_anthropic_join_two_turns(client):
    """As their own servers do: with an empty line between them, and as blocks of one turn."""

    def read(messages: list[Any], **fields: Any) -> tuple[int, str]:
        body = {"messages": messages, "stream": False, "options": {"temperature": 0, "num_predict": 8}, **fields}
        reply = client.post("/api/chat", json={"model": "demo", **body}).json()
        return reply["prompt_eval_count"], reply["message"]["content"]

    joined = [TWO[0], {"role": "assistant", "content": "I am\n\na tiny"}]
    assert read(TWO) == read(joined)
    assert read([TWO[0], {**TWO[1], "images": []}, {**TWO[2], "tool_calls": None}]) == read(joined)
    assert read(TWO, continue_final_message=False)[0] > read(joined)[0]
    thoughtful = [TWO[0], {**TWO[1], "thinking": "Hm"}, TWO[2]]
    refused = client.post("/api/chat", json={"model": "demo", "messages": thoughtful})
    assert (refused.status_code, "Cannot have 2" in refused.text) == (400, True)
    reply = client.post("/v1/messages", json={"messages": TWO, "max_tokens": 5})
    assert reply.status_code == 200, reply.text
