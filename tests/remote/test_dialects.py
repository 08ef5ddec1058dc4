"""Requests in every server's dialect, against strict stand-ins: what is sent, what comes back, what is refused."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_runtime import EndpointError, ImageError, MessageError, Model, PromptTooLongError
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.slicing import plan_slices
from edge_runtime.options import GenerationOptions
from edge_runtime.remote.dialects import DONE_HERE, HINTS, NAMES, dialect_named
from edge_runtime.remote.media import OFFICIAL
from edge_runtime.remote.requests import LIMITS, checked
from support.document_maker import words_pdf
from support.fake_servers import FakeServer, chunk, chunks, fake, refuse, say
from support.video_maker import SIZE, make_video, number_of, numbered

STRICT = ("vllm", "old vllm", "sglang", "openai")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(params=STRICT)
def server(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    with fake(request.param) as found:
        yield found


def body(server: FakeServer, messages: Any = "Hello?", **options: Any) -> dict[str, Any]:
    """The request that a call makes."""
    with Model.connect(server.url, retries=0) as model:
        model.chat(messages, **options)
    return server.asked[-1]


def sent_picture(part: dict[str, Any]) -> tuple[str, bytes]:
    head, _, data = part["image_url"]["url"].partition(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def pattern(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


def test_text(server):
    with Model.connect(server.url) as model:
        assert model.dialect.name == server.kind.split()[-1]
        assert (model.name, model.n_ctx) == ("the-model", 4096)
        answer = model.chat("Who?", seed=4, stop=["X"], max_tokens=7)
        assert (answer.answer, answer.finish_reason, answer.model) == ("Hello there", "stop", "the-model")
        assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (11, 5, 3)
        assert answer.reasoning_tokens == 2
        assert answer.timings_s["total"] > 0
    (asked,) = server.asked
    assert asked["messages"] == [{"role": "user", "content": "Who?"}]
    assert (asked["model"], asked["seed"], asked["stop"], asked["max_tokens"]) == ("the-model", 4, ["X"], 7)


def test_stream_and_several_answers(server):
    with Model.connect(server.url) as model:
        assert [piece.text for piece in model.chat("Hello?", stream=True)] == ["Hello", " there"]
        assert [str(answer) for answer in model.chat_n("Hello?", 3, seed=9)] == ["Hello there"] * 3
    assert sorted(asked["seed"] for asked in server.asked[1:]) == [9, 10, 11]


def test_official_sampling_where_the_model_is_ours_to_choose(server):
    sent = body(server)
    if server.kind == "openai":
        assert not {"temperature", "top_p", "repetition_penalty"} & sent.keys()
    else:
        assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["repetition_penalty"]) == (
            0.7,
            0.8,
            100,
            1.03,
        )
    greedy = body(server, greedy=True)
    assert greedy["temperature"] == 0
    if server.kind != "openai":
        assert greedy["top_k"] == -1


def test_thinking(server):
    on, off = body(server, thinking=True), body(server)
    if server.kind == "openai":
        assert (on["reasoning_effort"], "reasoning_effort" in off) == ("medium", False)
    else:
        assert on["chat_template_kwargs"] == {"enable_thinking": True}
        assert off["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_comes_back_under_either_name(name):
    with fake("vllm", chunks(chunk(**{name: "Hm"}), chunk(content="Yes"), chunk("stop"))) as server:
        with Model.connect(server.url) as model:
            pieces = [(piece.kind, piece.text) for piece in model.chat("?", stream=True, thinking=True)]
        assert pieces == [("reasoning", "Hm"), ("answer", "Yes")]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Hm", "m</th", "ink>\n\nYes", "!"], ("Hmm", "Yes!")),
        (["<think>\nHm</think>", "Yes"], ("Hm", "Yes")),
        (["Yes"], (None, "Yes")),
        (["<think>never ends"], ("never ends", "")),
    ],
)
def test_reasoning_of_a_server_without_a_parser(texts, expected):
    with fake("sglang", say(*texts)) as server, Model.connect(server.url) as model:
        answer = model.chat("?", thinking=True)
        assert (answer.reasoning, answer.answer) == expected
        assert model.chat("?").answer == "".join(texts)  # not asked for: text is text


def test_budget_of_reasoning():
    with fake("vllm") as server:
        assert body(server, thinking=True, thinking_budget=9)["thinking_token_budget"] == 9
    for kind, name in (("old vllm", "0.10"), ("sglang", "SGLang"), ("openai", "OpenAI")):
        with fake(kind) as server, Model.connect(server.url) as model:
            with pytest.raises(MessageError, match=rf"thinking_budget was given.*{name}"):
                model.chat("?", thinking=True, thinking_budget=9)
            assert server.asked == []


def test_schema_and_json(server):
    asked = body(server, schema=SCHEMA)["response_format"]
    assert asked == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    assert body(server, json=True)["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    ("kind", "option", "value", "fields"),
    [
        ("vllm", "choices", ["a", "b"], {"structured_outputs": {"choice": ["a", "b"]}}),
        ("vllm", "regex", "a+", {"structured_outputs": {"regex": "a+"}}),
        ("vllm", "grammar", 'root ::= "a"', {"structured_outputs": {"grammar": 'root ::= "a"'}}),
        ("old vllm", "choices", ["a", "b"], {"guided_choice": ["a", "b"]}),
        ("old vllm", "regex", "a+", {"guided_regex": "a+"}),
        ("sglang", "choices", ["a.", "b"], {"regex": r"(a\.|b)"}),
        ("sglang", "regex", "a+", {"regex": "a+"}),
        ("sglang", "grammar", 'root ::= "a"', {"ebnf": 'root ::= "a"'}),
    ],
)
def test_forms_of_texts(kind, option, value, fields):
    with fake(kind) as server:
        sent = body(server, **{option: value})
        assert {name: sent[name] for name in fields} == fields


def test_tools_there_and_back(server):
    parts = [{"index": 0, "id": "c9", "type": "function", "function": {"name": "look", "arguments": '{"at"'}}]
    rest = [{"index": 0, "function": {"arguments": ': "it"}'}}]
    server.script[:] = [chunks(chunk(tool_calls=parts), chunk(tool_calls=rest), chunk("tool_calls")), say("Seen")]
    question = {"role": "user", "content": "Look"}
    with Model.connect(server.url) as model:
        answer = model.chat([question], tools=[TOOL])
        (call,) = answer.tool_calls
        assert (call.name, call.arguments, answer.finish_reason) == ("look", {"at": "it"}, "stop")
        result = {"role": "tool", "content": "a cat"}
        assert model.chat([question, answer.message(), result], tools=[TOOL], tool_choice="auto").answer == "Seen"
        model.chat([question], tools=[TOOL["function"]], tool_choice="none")
    first, second, third = server.asked
    assert (first["tools"], first["tool_choice"], "tools" in third) == ([TOOL], "auto", False)
    _, asked, told = second["messages"]
    (sent,) = asked["tool_calls"]
    assert (sent["function"]["name"], json.loads(sent["function"]["arguments"])) == ("look", {"at": "it"})
    assert told == {"role": "tool", "content": "a cat", "tool_call_id": sent["id"]}


def test_a_call_that_must_come_is_missed(server):
    with Model.connect(server.url) as model, pytest.raises(EndpointError, match="called none, after 11 characters"):
        model.chat("Look", tools=[TOOL], tool_choice="look")
    assert server.asked[0]["tool_choice"] == {"type": "function", "function": {"name": "look"}}


def test_calls_that_are_none_are_reported():
    parts = [{"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at'}}]
    with (
        fake("vllm", chunks(chunk(tool_calls=parts), chunk("tool_calls"))) as server,
        Model.connect(server.url) as model,
    ):
        answer = model.chat("Look", tools=[TOOL])
        assert (len(answer.malformed_calls), answer.tool_calls) == (1, [])


def test_ids_of_calls_are_kept(server):
    calls = [
        {"id": name, "type": "function", "function": {"name": "look", "arguments": "{}"}} for name in ("one", "two")
    ]
    sent = body(
        server,
        [
            {"role": "user", "content": "Look"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "2", "tool_call_id": "two"},
            {"role": "tool", "content": "1"},
        ],
        tools=[TOOL],
    )
    assert [message["tool_call_id"] for message in sent["messages"][2:]] == ["two", "one"]
    with Model.connect(server.url) as model, pytest.raises(MessageError, match="no call is without a result"):
        model.chat([{"role": "user", "content": "?"}, {"role": "tool", "content": "1"}])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_plain_pictures_are_sent_as_they_are(server, tmp_path, kind):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(pattern(40, 30), kind))
    (message,) = body(server, [{"role": "user", "content": [path, "What?"]}])["messages"]
    assert sent_picture(message["content"][0]) == (f"image/{kind.lower()}", path.read_bytes())
    assert message["content"][1] == {"type": "text", "text": "What?"}


def test_pictures_that_servers_read_differently_are_sent_as_our_pixels(server):
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = pattern(40, 30)
    alpha.putalpha(128)
    for data in (
        encoded(pattern(40, 30), "JPEG", exif=turned),
        encoded(alpha, "PNG"),
        encoded(pattern(40, 30).convert("CMYK"), "JPEG"),
        encoded(pattern(40, 30), "TIFF"),
        encoded(pattern(40, 30), "WEBP", lossless=True),
        encoded(pattern(40, 30).convert("P"), "GIF"),
    ):
        (message,) = body(server, [{"role": "user", "content": [data, "?"]}])["messages"]
        kind, png = sent_picture(message["content"][0])
        assert kind == "image/png"
        sent, own = Image.open(io.BytesIO(png)), load_image(data)
        assert (sent.mode, sent.size, sent.tobytes()) == ("RGB", own.size, own.tobytes())


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_max_slices_makes_pictures_small_enough(server, cells):
    with Model.connect(server.url) as model:
        answer = model.chat([{"role": "user", "content": [pattern(1700, 1100), "?"]}], max_slices=cells)
    assert answer.pictures == [[1700, 1100]]
    _, png = sent_picture(server.asked[-1]["messages"][0]["content"][0])
    size = Image.open(io.BytesIO(png)).size
    assert plan_slices(*size, OFFICIAL, None).n_slices <= cells + (cells > 1)  # and the overview


def test_bad_pictures_are_refused_before_anything_is_sent(server):
    with Model.connect(server.url) as model:
        with pytest.raises(ImageError):
            model.chat([{"role": "user", "content": [b"no picture", "?"]}])
        with pytest.raises(ImageError, match="does not exist"):
            model.chat([{"role": "user", "content": [Path("missing.png"), "?"]}])
    assert server.asked == []


def test_videos_are_the_official_frames(server):
    frames = [numbered(i) for i in range(50)]
    video = {"type": "video", "video": make_video(frames, 25, codec="libx264")}
    with Model.connect(server.url) as model:
        answer = model.chat([{"role": "user", "content": [video, "?"]}])
    part = server.asked[-1]["messages"][0]["content"]
    if server.kind.endswith("vllm"):
        head, _, data = part[0]["video_url"]["url"].partition(",")
        assert head == "data:video/jpeg;base64"
        pictures = [base64.b64decode(each) for each in data.split(",")]
        assert server.asked[-1]["media_io_kwargs"] == {"video": {"num_frames": -1}}
    else:
        pictures = [sent_picture(each)[1] for each in part[:-1]]
    assert [number_of(Image.open(io.BytesIO(each))) for each in pictures] == [4, 12, 20, 29, 37, 45]
    assert answer.pictures == [[*SIZE]] * 6
    assert [time for times in answer.videos[0]["times_s"] for time in times] == [0.16, 0.48, 0.8, 1.16, 1.48, 1.8]
    with Model.connect(server.url) as model, pytest.raises(MessageError, match="packing of a video is 3"):
        model.chat([{"role": "user", "content": [{**video, "packing": 3}, "?"]}])


def test_documents_are_drawn_here(server):
    pdf = {"type": "pdf", "pdf": words_pdf(["one", "two", "three"]), "pages": "1,3"}
    with Model.connect(server.url) as model:
        answer = model.chat([{"role": "user", "content": [pdf, "?"]}])
    content = server.asked[-1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    sizes = [list(Image.open(io.BytesIO(sent_picture(part)[1])).size) for part in content[:2]]
    assert sizes == answer.pictures


def test_beginnings_are_continued_or_refused(server):
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I am"}]
    if server.kind == "openai":
        with Model.connect(server.url) as model, pytest.raises(MessageError, match="starts a new turn"):
            model.chat(messages)
    else:
        assert body(server, messages)["continue_final_message"] is True
    assert "continue_final_message" not in body(server, messages, continue_final_message=False)


def test_logprobs(server):
    scores = {
        "content": [
            {"token": "Yes", "logprob": -0.5, "bytes": [89], "top_logprobs": [{"token": "No", "logprob": -1}]}
        ]
    }
    server.script[:] = [chunks(chunk(content="Yes", logprobs=scores), chunk("stop"))]
    with Model.connect(server.url) as model:
        (score,) = model.chat("?", logprobs=True, top_logprobs=1).logprobs
    assert (score.token, score.logprob, score.bytes, score.top_logprobs[0].token) == ("Yes", -0.5, [89], "No")
    assert server.asked[0]["top_logprobs"] == 1


def test_stop_strings_are_named():
    for kind, name in (("vllm", "stop_reason"), ("sglang", "matched_stop")):
        with fake(kind, say("Hello", **{name: "X"})) as server, Model.connect(server.url) as model:
            assert model.chat("?", stop=["X"]).stop_string == "X"


OTHER_VALUES = {
    "sampling": False,
    "beams": 3,
    "adapter": "a",
    "raw": True,
    "prompt_ids": [1],
    "prompt_only": True,
    "prompt_logprobs": True,
    "context_shift": True,
    "fit": True,
    "use_image_id": False,
    "temporal_ids": [[1]],
    "repetition_check": False,
    "stop_in_reasoning": True,
    "typical_p": 0.5,
    "reuse": False,
    "allowed_token_ids": [1],
}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_sent_done_here_or_refused(name):
    known = dialect_named(name).takes | DONE_HERE | HINTS
    others = set(GenerationOptions.__dataclass_fields__) - known
    assert {*OTHER_VALUES} - known <= others
    for option in others & OTHER_VALUES.keys():
        with pytest.raises(MessageError, match=f"{option} was given, but"):
            checked(GenerationOptions(**{option: OTHER_VALUES[option]}), dialect_named(name), LIMITS)


def test_unknown_options_and_missing_parts(server):
    with Model.connect(server.url) as model:
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            model.chat("?", colour="red")
        with pytest.raises(AttributeError, match="has no 'build_prompt'; load it"):
            model.build_prompt("?")


def test_errors_of_the_server():
    with fake("vllm", refuse(400, "top_k is odd")) as server, Model.connect(server.url) as model:
        with pytest.raises(EndpointError, match=r"refuses the request \(status 400\): top_k is odd") as caught:
            model.chat("?")
        assert (caught.value.status, caught.value.may_pass, len(server.asked)) == (400, False, 1)
    long = "This model's maximum context length is 8 tokens."
    too_long = pytest.raises(PromptTooLongError, match="maximum context")
    with fake("vllm", refuse(400, long)) as server, Model.connect(server.url) as model, too_long:
        model.chat("?")


def test_several_models_want_a_name():
    with fake("openai", n_models=2) as server:
        with pytest.raises(MessageError, match="has 2 models; name the one to ask: the-model"):
            Model.connect(server.url)
        with Model.connect(server.url, "the-model") as model:
            assert model.chat("?").answer == "Hello there"
