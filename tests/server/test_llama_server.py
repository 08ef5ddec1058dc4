"""llama-server's routes, as its own tests and Frigate ask them: shapes, statuses and what is kept or refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from edge_runtime.generation.text_stream import Piece
from edge_runtime.server.errors import LLAMA_SERVER, api_of
from edge_runtime.server.openai import llama_server
from edge_runtime.server.openai.llama_server_facts import MEDIA_MARKER
from edge_runtime.server.openai.llama_server_replies import LlamaCompletions
from edge_runtime.server.openai.llama_server_requests import LlamaCompletionRequest
from server.asked import ANSWER
from server.asked import PROMPT as HELLO
from server.asked import SIGN_BASE64 as PICTURE
from server.made_answers import made_answer, scored

FIELDS = {
    *("index", "content", "tokens", "id_slot", "stop", "model", "tokens_predicted", "tokens_evaluated"),
    *("generation_settings", "prompt", "has_new_line", "truncated", "stop_type", "stopping_word", "tokens_cached"),
    "timings",
}


def completed(
    client: httpx.Client, prompt: Any = HELLO, status: int = 200, path: str = "/completion", **fields: Any
) -> Any:
    reply = client.post(path, json={"prompt": prompt, "temperature": 0, "n_predict": 40, **fields})
    assert reply.status_code == status, reply.text
    return reply.json()


def streamed(client: httpx.Client, path: str = "/completion", **body: Any) -> list[dict[str, Any]]:
    reply = client.post(path, json={"stream": True, "temperature": 0, "n_predict": 40, **body})
    assert reply.status_code == 200, reply.text
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("path", ["/completion", "/completions"])
def test_a_prompt_is_gone_on_with(client, path):
    reply = completed(client, path=path)
    assert reply.keys() == FIELDS
    assert (reply["content"], reply["stop_type"], reply["tokens"]) == (ANSWER, "eos", [])
    assert (reply["prompt"], reply["stop"], reply["truncated"], reply["has_new_line"]) == (HELLO, True, False, False)
    settings = reply["generation_settings"]
    assert settings["temperature"] == 0
    assert {"seed", "top_k", "samplers", "adaptive_target", "mirostat", "stop", "n_predict", "logit_bias"} <= {
        *settings
    }
    assert reply["timings"]["prompt_n"] + reply["timings"]["cache_n"] == reply["tokens_evaluated"]
    assert reply["timings"]["predicted_n"] == reply["tokens_predicted"]


def test_why_an_answer_ended(client):
    cut = completed(client, n_predict=3)
    assert (cut["stop_type"], cut["tokens_predicted"], cut["generation_settings"]["n_predict"]) == ("limit", 3, 3)
    stopped = completed(client, stop=["model", "demo"])
    assert (stopped["stop_type"], stopped["stopping_word"], stopped["content"]) == ("word", "demo", "I am a tiny ")
    assert completed(client, stop="tiny")["stopping_word"] == "tiny"
    assert completed(client, n_predict=-1)["content"] == ANSWER


def test_nothing_but_the_prompt(client):
    reply = completed(client, "a prompt that nobody sent before", n_predict=0)
    assert (reply["content"], reply["tokens_predicted"], reply["stop_type"]) == ("", 0, "limit")
    assert completed(client, "a prompt that nobody sent before", n_predict=1)["tokens_cached"] > 0


def test_token_ids_and_texts_are_the_same_prompt(client):
    tokens = client.post("/tokenize", json={"content": HELLO}).json()["tokens"]
    middle = len(tokens) // 2
    half = client.post("/detokenize", json={"tokens": tokens[:middle]}).json()["content"]
    for prompt in (
        tokens,
        {"prompt_string": HELLO},
        [half, *tokens[middle:]],
        [*tokens[:middle], HELLO[len(half) :]],
    ):
        assert completed(client, prompt)["content"] == ANSWER
    assert completed(client, tokens)["prompt"] == HELLO


def test_several_prompts_and_answers(client):
    tokens = client.post("/tokenize", json={"content": HELLO}).json()["tokens"]
    replies = completed(client, [HELLO, tokens, {"prompt_string": HELLO}])
    assert [reply["index"] for reply in replies] == [0, 1, 2]
    assert {reply["content"] for reply in replies} == {ANSWER}
    assert len(completed(client, [HELLO, tokens], n_cmpl=2)) == 4
    assert len(completed(client, n=3)) == 3
    assert completed(client, [HELLO])["content"] == ANSWER  # a list of one is no list of replies there
    assert "stream" in completed(client, [HELLO, HELLO], 400, stream=True)["error"]["message"]


def test_a_picture_stands_at_its_mark(client):
    template = client.post(
        "/apply-template",
        json={"messages": [{"role": "user", "content": [image(), {"type": "text", "text": "What does it say?"}]}]},
    ).json()["prompt"]
    assert template.count(MEDIA_MARKER) == 1
    assert "<unk>" not in template
    assert client.get("/props").json()["media_marker"] == MEDIA_MARKER
    reply = completed(client, {"prompt_string": template, "multimodal_data": [PICTURE]})
    assert reply["content"] == "CAFE"
    asked = client.post("/chat/completions/input_tokens", json={"messages": [{"role": "user", "content": [image()]}]})
    assert asked.json()["input_tokens"] > 64


def image() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}


@pytest.mark.parametrize(
    "prompt",
    [
        *([], {}, 5, None, True, [[]], [["a", "b"]], [1, -1], [1, 2.5], [1, 10**9], [1, True], [1, None], ""),
        {"prompt_string": f"a {MEDIA_MARKER}", "multimodal_data": []},
        {"prompt_string": "a", "multimodal_data": [PICTURE]},
        {"prompt_string": f"a {MEDIA_MARKER}", "multimodal_data": PICTURE},
        {"prompt_string": f"a {MEDIA_MARKER}", "multimodal_data": ["malformed"]},
        {"prompt_string": f"a {MEDIA_MARKER}", "multimodal_data": ["/etc/passwd"]},
        {"prompt_string": f"a {MEDIA_MARKER}", "multimodal_data": [""]},
        {"prompt_string": 5},
    ],
)
def test_prompts_of_the_wrong_form_are_refused(client, prompt):
    error = completed(client, prompt, 400)["error"]
    assert (error["code"], error["type"]) == (400, "invalid_request_error")
    assert len(error["message"]) > 20


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"json_schema": {"const": "42"}}, '"42"'),
        ({"json_schema": {"enum": ["a"]}, "stream": False}, '"a"'),
        ({"grammar": 'root ::= "a"{5,5}'}, "aaaaa"),
    ],
)
def test_forms_are_kept(client, fields, content):
    assert completed(client, **fields)["content"] == content


def test_an_empty_schema_is_some_object(client):
    assert isinstance(json.loads(completed(client, json_schema={})["content"]), dict)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        *(
            ({name: 1}, name)
            for name in ("mirostat", "dynatemp_range", "xtc_probability", "dry_multiplier", "n_indent")
        ),
        *(({name: [{"role": "user"}]}, name) for name in ("messages", "tools", "lora")),
        *(({name: True}, name) for name in ("post_sampling_probs", "grammar_lazy", "echo")),
        ({"samplers": ["temperature"]}, "samplers"),
        ({"t_max_predict_ms": 100}, "t_max_predict_ms"),
        ({"adaptive_target": 0.5}, "adaptive_target"),
        ({"reasoning_budget_tokens": 5}, "reasoning_budget_tokens"),
        ({"n_predict": -2}, "n_predict"),
        ({"n_predict": "5"}, "n_predict"),
        ({"n_probs": 30}, "n_probs"),
        ({"n_cmpl": 0}, "n_cmpl"),
        ({"response_fields": "content"}, "response_fields"),
        ({"json_schema": {"type": 5}}, "json_schema"),
        ({"grammar": "root ::= this is (not GBNF"}, "grammar"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "grammar"),
        ({"logit_bias": [[5]]}, "logit_bias"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(client, fields, name):
    assert name in completed(client, status=400, **fields)["error"]["message"]


def test_what_changes_no_answer_is_passed_over(client):
    speed = {"id_slot": 3, "n_keep": -1, "n_discard": 5, "min_keep": 1, "sse_ping_interval": 5}
    off = {"mirostat": 0, "dry_multiplier": 0.0, "xtc_probability": 0, "top_n_sigma": -1, "dynatemp_range": 0.0}
    empty = {"lora": [], "samplers": [], "grammar": "", "post_sampling_probs": False, "t_max_predict_ms": -1}
    harmless = speed | off | empty | {"json_schema": None, "n_probs": 0}
    assert completed(client, **harmless)["content"] == ANSWER


def test_probabilities(client):
    reply = completed(client, n_probs=3, n_predict=5)
    assert len(reply["completion_probabilities"]) == 5
    for token in reply["completion_probabilities"]:
        assert token.keys() == {"id", "token", "bytes", "logprob", "top_logprobs"}
        assert token["logprob"] <= 0
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0] == {key: token[key] for key in ("id", "token", "bytes", "logprob")}
    assert completed(client, logprobs=1, n_predict=2)["completion_probabilities"]
    chunks = streamed(client, prompt=HELLO, n_probs=2)
    assert all(len(chunk["completion_probabilities"]) == 1 for chunk in chunks if not chunk["stop"])


def test_fields_that_are_wanted(client):
    wanted = ["content", "generation_settings/n_predict", "prompt", "nothing/here"]
    reply = completed(client, response_fields=wanted)
    assert reply == {"content": ANSWER, "generation_settings/n_predict": 40, "prompt": HELLO}


def test_tokens_that_are_never_chosen(client):
    first = completed(client, return_tokens=True, n_predict=1)
    assert len(first["tokens"]) == 1
    for bias in ([[first["tokens"][0], False]], {str(first["tokens"][0]): -100}, [[first["content"], -100]]):
        assert completed(client, logit_bias=bias, n_predict=1)["content"] != first["content"]
    assert completed(client)["generation_settings"]["logit_bias"] == []
    endless = completed(client, ignore_eos=True, n_predict=30)
    assert (endless["tokens_predicted"], endless["stop_type"]) == (30, "limit")
    assert all(entry["bias"] is None for entry in endless["generation_settings"]["logit_bias"])
    assert endless["generation_settings"]["logit_bias"]


def test_a_stream_says_what_a_whole_reply_says(client):
    chunks = streamed(client, prompt=HELLO, return_progress=True, timings_per_token=True)
    *pieces, last = chunks
    assert "".join(chunk["content"] for chunk in chunks) == ANSWER
    assert [chunk["stop"] for chunk in chunks] == [False] * len(pieces) + [True]
    whole = completed(client, return_tokens=True)
    assert [token for chunk in pieces for token in chunk["tokens"]] == whole["tokens"]
    assert last.keys() == FIELDS
    for name in ("tokens_predicted", "tokens_evaluated", "stop_type", "prompt"):
        assert last[name] == whole[name]
    said = [chunk for chunk in pieces if chunk["content"]]
    assert all(chunk["tokens"] and chunk["timings"]["predicted_n"] for chunk in said)
    assert {chunk["tokens_evaluated"] for chunk in chunks} == {whole["tokens_evaluated"]}


def test_a_piece_of_several_tokens_is_several_chunks():
    replies = LlamaCompletions("demo", {}, ["Hi"], 512, n_top=1, returns_ids=True)
    piece = Piece("é", "answer", (scored("\u00c3"), scored("\u00a9")))
    chunks = [*replies.piece(0, piece)]
    assert [chunk["content"] for chunk in chunks] == ["", "é"]
    assert [chunk["tokens_predicted"] for chunk in chunks] == [1, 2]
    assert [*replies.piece(0, Piece("", "answer"))] == []


def test_an_answer_that_fills_the_context_is_truncated():
    replies = LlamaCompletions("demo", {}, ["Hi"], 29)
    assert replies.end(0, made_answer(finish_reason="length"))["truncated"]
    assert not replies.end(0, made_answer())["truncated"]


# --- other routes --------------------------------------------------------------------------------------------------


def test_openais_routes_without_a_version(client):
    hello = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
    assert client.post("/chat/completions", json=hello).json()["choices"][0]["message"]["content"] == ANSWER
    assert client.post("/responses", json={"input": "Who are you?", "temperature": 0}).json()["object"] == "response"
    assert client.post("/responses/input_tokens", json={"input": "Hi"}).json()["input_tokens"] > 0
    assert client.get("/models").json() == client.get("/v1/models").json()
    assert client.get("/v1/health").json()["status"] == "ok"


def test_every_route_without_a_version_is_there(server):
    from edge_runtime.server.openai import chat as openai
    from edge_runtime.server.openai import responses

    found = {route.path for route in llama_server.without_version(openai.router, responses.router).routes}
    assert found == {path.removeprefix("/v1") for path in llama_server.WITHOUT_VERSION}


@pytest.mark.parametrize("path", llama_server.NOT_OFFERED)
def test_what_is_not_offered_is_refused_by_a_sentence(client, path):
    reply = client.post(path.replace("{number}", "0"), json={})
    assert reply.status_code == 501
    error = reply.json()["error"]
    assert len(error["message"]) > 20
    if api_of(path) == "llama":
        assert (error["code"], error["type"]) == (501, "not_supported_error")
    assert client.get("/slots").status_code == 501


def test_errors_have_its_form(client):
    for path in ("/completion", "/tokenize", "/apply-template", "/chat/completions"):
        assert path.startswith(LLAMA_SERVER)
        error = client.post(path, content="{").json()["error"]
        assert (error["code"], error["type"]) == (400, "invalid_request_error")
    missing = completed(client, status=404, model="nothing")["error"]
    assert (missing["code"], missing["type"]) == (404, "not_found_error")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completion", {"prompt": "word " * 5000}),
        ("/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}]}),
        ("/completion", {"prompt": "word " * 5000, "stream": True}),
    ],
)
def test_a_prompt_that_is_too_long_tells_the_numbers(client, path, body):
    reply = client.post(path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "exceed_context_size_error")
    assert (
        error["n_prompt_tokens"]
        > error["n_ctx"]
        == client.get("/props").json()["default_generation_settings"]["n_ctx"]
    )


def test_apply_template(client):
    hello = [{"role": "user", "content": "Who are you?"}]
    assert client.post("/apply-template", json={"messages": hello}).json() == {"prompt": HELLO}
    thinking = {"messages": hello, "chat_template_kwargs": {"enable_thinking": True}}
    assert client.post("/apply-template", json=thinking).json()["prompt"].endswith("<think>\n")
    begun = {"messages": [*hello, {"role": "assistant", "content": "I am"}]}
    assert client.post("/apply-template", json=begun).json()["prompt"] == HELLO + "I am"
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    assert "weather" in client.post("/apply-template", json={"messages": hello, "tools": [tool]}).json()["prompt"]
    assert client.post("/apply-template", json={"messages": []}).status_code == 400


def test_what_frigate_reads(client):
    """Its `llama_cpp` provider: the model's entry in the list, then `/props`."""
    (entry,) = [model for model in client.get("/v1/models").json()["data"] if model["id"] == "demo"]
    props = client.get("/props", params={"model": "demo"}).json()
    assert "image" in entry["architecture"]["input_modalities"]
    assert "audio" not in entry["architecture"]["input_modalities"]
    assert entry["meta"]["n_ctx"] == props["default_generation_settings"]["n_ctx"]
    assert entry["aliases"] == ["demo:latest"]
    assert props["modalities"] == {"vision": True, "video": True, "audio": False}
    assert isinstance(props["chat_template_caps"]["supports_tools"], bool)
    assert "enable_thinking" in props["chat_template"]
    meta = entry["meta"]
    assert meta["n_vocab"] > 256
    assert meta["n_ctx_train"] >= meta["n_ctx"]
    assert all(
        isinstance(meta[name], int) and meta[name] > 0 for name in ("n_embd", "n_params", "size", "vocab_type")
    )
    models = client.get("/models").json()["models"]
    assert {"completion", "multimodal"} <= {*models[0]["capabilities"]}


def test_adapters(client):
    assert client.get("/lora-adapters").json() == []


def test_a_limit_under_every_name():
    for name in ("n_predict", "max_tokens", "max_completion_tokens"):
        assert LlamaCompletionRequest.model_validate({"prompt": "a", name: 5}).most_tokens == 5
    both = LlamaCompletionRequest.model_validate({"prompt": "a", "n_predict": 5, "max_tokens": 7})
    assert both.most_tokens == 5
    assert LlamaCompletionRequest.model_validate({"prompt": "a"}).most_tokens is None
