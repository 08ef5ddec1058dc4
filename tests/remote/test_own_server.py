"""Our own server behind `Model.connect` and `run --endpoint`: the same answers as from the model itself."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageDraw

from edge_runtime import Model, RemoteModel
from edge_runtime.cli.program import main
from server.conftest import own_store, server  # noqa: F401 - fixtures
from support.document_maker import words_pdf
from support.video_maker import make_video, numbered

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
SHORT = {"greedy": True, "max_tokens": 12}


@pytest.fixture(scope="module")
def here():
    with Model.load("demo") as model:
        yield model


@pytest.fixture
def there(server):  # noqa: F811
    with Model.connect(server.url) as model:
        yield model


def picture(word: str = "CAT") -> Image.Image:
    found = Image.new("RGB", (448, 448), "white")
    ImageDraw.Draw(found).text((100, 100), word, fill="black", font_size=120)
    return found


def contents():
    yield "text", ["Who are you?"]
    yield "picture", [picture(), "What does it say?"]
    yield "video", [{"type": "video", "video": make_video([numbered(i) for i in range(30)], 25)}, "What?"]
    yield "document", [{"type": "pdf", "pdf": words_pdf(["CAT", "DOG"]), "pages": "2"}, "What does it say?"]


@pytest.mark.parametrize(("name", "content"), [*contents()], ids=[name for name, _ in contents()])
def test_answers_are_the_models_own(here, there, name, content):
    messages = [{"role": "user", "content": content}]
    own, other = here.chat(messages, **SHORT), there.chat(messages, **SHORT)
    assert isinstance(there, RemoteModel)
    for fact in ("answer", "finish_reason", "prompt_tokens", "visual_tokens", "completion_tokens"):
        assert getattr(other, fact) == getattr(own, fact), fact
    pieces = [piece.text for piece in there.chat(messages, stream=True, **SHORT)]
    assert "".join(pieces) == own.answer


def test_forms_thinking_and_tools(here, there):
    assert there.chat("?", schema=SCHEMA, **SHORT).answer == here.chat("?", schema=SCHEMA, **SHORT).answer
    assert there.chat("?", choices=["red", "green"], **SHORT).answer in ("red", "green")
    own = here.chat("?", thinking=True, thinking_budget=4, **SHORT)
    other = there.chat("?", thinking=True, thinking_budget=4, **SHORT)
    assert (other.reasoning, other.answer) == (own.reasoning, own.answer)
    (call,) = there.chat("?", tools=[TOOL], tool_choice="required", greedy=True, max_tokens=64).tool_calls
    assert call.name == "look"
    assert call.arguments["a"] in (1, 2)


def test_the_command(server, capsys, tmp_path):  # noqa: F811
    path = tmp_path / "a.png"
    picture().save(path)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path), "What does it say?", "--endpoint", server.url, "--greedy", "--max-tokens", "8"])
    assert (ended.value.code, capsys.readouterr().out) == (0, "CAT\n")
    for wrong in (["--endpoint", server.url, "--ctx", "512"], ["--retries", "2"]):
        with pytest.raises(SystemExit) as ended:
            main(["run", "Hello?", *wrong])
        assert ended.value.code == 2
        assert "endpoint" in capsys.readouterr().err


def test_a_batch(server, capsys, tmp_path):  # noqa: F811
    for i in range(3):
        picture().save(tmp_path / f"{i}.png")
    out = tmp_path / "out.jsonl"
    words = ["batch", str(tmp_path), "--prompt", "What does it say?", "--greedy", "--max-tokens", "8", "-o", str(out)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--endpoint", server.url])
    assert ended.value.code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [str(tmp_path / f"{i}.png") for i in range(3)]
    assert [(line["answer"], line["error"]) for line in lines] == [("CAT", None)] * 3
    for wrong in (["--ray", "local"], ["--threads", "2"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--endpoint", server.url, *wrong])
        assert ended.value.code == 2
        assert wrong[0] in capsys.readouterr().err
