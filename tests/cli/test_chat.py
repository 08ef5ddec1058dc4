"""The chat in a terminal: going on with an answer, files in what is written, and what is said at the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from edge_runtime import Model
from edge_runtime.answers import TOY_NOTICE
from edge_runtime.cli.chat import HELP, Chat
from edge_runtime.cli.piped import Piped
from edge_runtime.cli.program import main
from support.gguf_maker import BOOL, mini_decoder, mini_mmproj

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"
QUESTION = "What does it say?"
OPTIONS = {"thinking": False, "pixel_limit": 10**8}


def talk(*lines: str | bytes, arguments: tuple[str, ...] = ()):
    text = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    result = CliRunner().invoke(main, ["run", "--greedy", *arguments], input=text)
    assert result.exit_code == 0, result.exception
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "my holiday.png", "narrow\u202fblank.png"):
        shutil.copy(EXAMPLE, tmp_path / name)
    return tmp_path


@pytest.fixture
def asked(demo: Model, monkeypatch: pytest.MonkeyPatch):
    """What a chat sends to the model; its answers are cut."""
    seen: list[tuple[list, dict]] = []
    cut = replace(demo.chat("Hello", temperature=0, max_tokens=3), finish_reason="cancelled")

    def answer(model, messages, options, quiet=False):
        seen.append(([*messages], options))
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        return replace(cut, prefix=begun)

    monkeypatch.setattr("edge_runtime.cli.terminal.answer", answer)
    return seen


def chat(demo: Model, monkeypatch: pytest.MonkeyPatch, *lines: str, files: Sequence[Piped] = ()) -> None:
    left = iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(left, None) or (_ for _ in ()).throw(EOFError))
    Chat(demo, [{"role": "system", "content": "s"}], dict(OPTIONS)).loop(files)


def test_an_answer_that_was_cut_goes_on():
    whole = talk("Hello").stdout
    result = talk("Hello", "/continue", arguments=("--max-tokens", "3"))
    first, second = result.stdout.splitlines()
    assert second
    assert whole.startswith(first + second), (whole, result.stdout)
    assert "The answer was cut off (length); /continue continues it." in result.stderr


def test_going_on_takes_the_place_of_the_turn(demo, monkeypatch, asked):
    chat(demo, monkeypatch, "one", "/continue", "/continue", "two")
    assert [len(messages) for messages, _ in asked] == [2, 3, 3, 4]
    assert [options.get("continue_final_message") for _, options in asked] == [None, True, True, None]
    said = [messages[-1]["content"] for messages, _ in asked[1:3]]
    assert said[1] == said[0] * 2
    assert asked[3][0][2] == {"role": "assistant", "content": said[0] * 3}


def test_nothing_to_go_on_with(demo, monkeypatch, asked, capsys):
    chat(demo, monkeypatch, "/continue", "one", "/clear", "/continue")
    assert len(asked) == 1
    assert capsys.readouterr().err.count("There is no answer to continue yet.") == 2
    assert "/continue" in HELP


@pytest.mark.parametrize(
    "line",
    [
        *("/image a.png", "/image 'a.png'", "/image ./a.png", "/image A.PNG", "/image my holiday.png"),
        *('/image "my holiday.png"', "/image my\\ holiday.png", "/image narrow blank.png", "a.png", "my holiday.png"),
        *("'my holiday.png'", "my\\ holiday.png", "{}/a.png", "file://{}/my%20holiday.png", "narrow blank.png"),
    ],
)
def test_one_file_is_found_however_it_is_written(demo, folder, monkeypatch, asked, line):
    chat(demo, monkeypatch, line.format(folder), QUESTION)
    ((messages, _),) = asked
    file, question = messages[-1]["content"]
    assert question == QUESTION
    assert file.samefile(EXAMPLE) or file.read_bytes() == EXAMPLE.read_bytes()


@pytest.mark.parametrize("line", ["/image a.png 'my holiday.png'", "a.png my\\ holiday.png", "{0}/a.png {0}/a.png"])
def test_several_files_on_one_line(demo, folder, monkeypatch, asked, line):
    chat(demo, monkeypatch, line.format(folder), QUESTION)
    ((messages, _),) = asked
    assert [type(part).__name__ for part in messages[-1]["content"]] == [type(folder).__name__] * 2 + ["str"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("circle.pgn", "circle.pgn does not exist"),
        ("sub/circle", "sub/circle does not exist"),
        ("/nowhere/x y.png", "does not exist"),
        ("my holidays.jpg", "does not exist, but my holiday.png is there"),
        ("rtsp://camera/1", "nothing is fetched"),
        ("What is in a.png?", "mentions a.png, which exists but was not given"),
        ("What is on https://host/a.png?", "nothing is fetched"),
        ("Node.js", "Node.js does not exist"),
    ],
)
def test_what_may_be_a_file_is_asked_when_it_comes_again(demo, folder, monkeypatch, asked, capsys, line, reason):
    chat(demo, monkeypatch, line, "Hello", line, line)
    assert [messages[-1]["content"] for messages, _ in asked] == [["Hello"], [line]]
    said = [text for text in capsys.readouterr().err.splitlines() if text.startswith("edge-runtime: ")]
    assert len(said) == 2
    assert all(reason in text and "enter the line again" in text for text in said), said


def test_a_question_about_a_picture_that_was_added(demo, folder, monkeypatch, asked):
    chat(demo, monkeypatch, "/image a.png", "What is in a.png?", "And in a.png now?", "/clear", "And in a.png?")
    assert [messages[-1]["content"][-1] for messages, _ in asked] == ["What is in a.png?", "And in a.png now?"]


@pytest.mark.parametrize("line", ["and/or", "What is 1/2?", "'Hello'", "Say yes.", "demo", "e.g.", "1/2"])
def test_prose_is_asked(demo, folder, monkeypatch, asked, line):
    (folder / "demo").mkdir()
    chat(demo, monkeypatch, line)
    assert [messages[-1]["content"] for messages, _ in asked] == [[line]]


def test_commands_are_no_files(demo, folder, monkeypatch, asked, capsys):
    chat(demo, monkeypatch, "/nope", "/image no/such.png", "/image -", "/image", "/help a/b", "/think")
    err = capsys.readouterr().err
    assert asked == []
    for told in (
        "no command /nope",
        "no/such.png does not exist",
        "this chat reads its questions from stdin",
        "/image needs a file",
    ):
        assert told in err


def test_a_line_that_is_no_text_is_not_asked(demo):
    result = talk(b"caf\xe9", "\ufeffHello")
    assert "not UTF-8 text, so it was not asked" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_a_mark_before_the_first_question(demo, monkeypatch, asked):
    result = CliRunner().invoke(main, ["run"], input="\ufeff/nope\n".encode())
    assert "no command /nope" in result.stderr


def test_what_came_through_a_pipe_goes_with_the_first_question(demo, monkeypatch, asked, capsys):
    chat(demo, monkeypatch, QUESTION, files=[Piped(EXAMPLE.read_bytes(), "/dev/fd/63")])
    ((messages, _),) = asked
    assert messages[-1]["content"] == [EXAMPLE.read_bytes(), QUESTION]
    assert "63 (320 x 160) goes with the next question." in capsys.readouterr().err


# ---------------------------------------------------------------- a model that is a toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("toy")
    mini_decoder().key("edge_runtime.toy", BOOL, True).write(folder / "m.gguf")
    mini_mmproj().write(folder / "mmproj.gguf")
    Image.new("RGB", (28, 28)).save(folder / "a.png")
    return str(folder)


def test_a_toy_says_so(toy):
    asks = ["run", "-m", toy, "--max-tokens", "1"]
    plain = CliRunner().invoke(main, [*asks, "a"])
    assert (plain.exit_code, plain.stderr.count(TOY_NOTICE)) == (0, 1), plain.stderr
    assert TOY_NOTICE not in plain.stdout
    found = CliRunner().invoke(main, [*asks, "a", "--json"])
    assert json.loads(found.stdout)["notice"] == TOY_NOTICE
    assert found.stderr.count(TOY_NOTICE) == 1
    pages = CliRunner().invoke(main, [*asks, f"{toy}/a.png", f"{toy}/a.png", "a", "--each-page", "--json"])
    assert [page["notice"] for page in json.loads(pages.stdout)["pages"]] == [TOY_NOTICE] * 2
    assert pages.stderr.count(TOY_NOTICE) == 1
    talked = CliRunner().invoke(main, asks, input="a\na\n")
    assert talked.stderr.count(TOY_NOTICE) == 1
    assert TOY_NOTICE not in talked.stdout


def test_others_do_not(tmp_path):
    mini_decoder().write(tmp_path / "m.gguf")
    mini_mmproj().write(tmp_path / "mmproj.gguf")
    found = CliRunner().invoke(main, ["run", "-m", str(tmp_path), "--max-tokens", "1", "a", "--json"])
    assert json.loads(found.stdout)["notice"] is None
    assert TOY_NOTICE not in found.stderr


def test_what_is_piped_in_is_one_prompt():
    result = CliRunner().invoke(main, ["run", "--greedy", str(EXAMPLE), "-"], input="What does\nit say?\n")
    assert (result.exit_code, result.stdout) == (0, "CAFE\n"), result.stderr
    assert "Text was read from stdin, characters: 17." in result.stderr


def test_settings_through_a_pipe():
    result = talk("/set parameter num_predict 1", "Hello", "/set history", "/set nothing", "/show info")
    assert "The answer was cut off (length)" in result.stderr
    assert "History is kept in a terminal only." in result.stderr
    assert "There is no setting 'nothing'" in result.stderr
