"""Files named inside a chat's line, and the messages that are kept for the arrow keys."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from edge_runtime.cli.chat import COMMANDS
from edge_runtime.cli.line_editor import MAX_KEPT, KeptHistory, Words, history_file, unquoted
from edge_runtime.cli.prompt_files import split_line

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other paths and rights")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b.jpg", "my holiday.png", "it's.png", "notes.txt", "report.pdf"):
        (tmp_path / name).touch()
    return tmp_path


@posix
@pytest.mark.parametrize(
    ("line", "question", "names"),
    [
        ("What is it? a.png", "What is it?", ["a.png"]),
        ("a.png What is it?", "What is it?", ["a.png"]),
        ("a.png b.jpg What differs?", "What differs?", ["a.png", "b.jpg"]),
        ("What differs? a.png ./b.jpg", "What differs?", ["a.png", "./b.jpg"]),
        ("What is in a.png?", "What is in a.png?", ["a.png"]),
        ("Compare a.png and ./b.jpg", "Compare a.png and b.jpg", ["a.png", "./b.jpg"]),
        ("What is it? my\\ holiday.png", "What is it?", ["my holiday.png"]),
        ("'my holiday.png' What is it?", "What is it?", ["my holiday.png"]),
        ('"my holiday.png" What is it?', "What is it?", ["my holiday.png"]),
        ("{}/a.png What is it?", "What is it?", ["{}/a.png"]),
        ("Is {}/a.png nice (b.jpg)?", "Is a.png nice (b.jpg)?", ["{}/a.png", "b.jpg"]),
        ("What is it? ~/a.png", "What is it?", ["~/a.png"]),
        ("file://{}/my%20holiday.png What is it?", "What is it?", ["{}/my holiday.png"]),
        ("Read report.pdf, please", "Read report.pdf, please", ["report.pdf"]),
        ("What is in notes.txt?", "What is in notes.txt?", []),
        ("It's a holiday, isn't it?", "It's a holiday, isn't it?", []),
        ("Is it a .png or 1/2?", "Is it a .png or 1/2?", []),
        ("What is in c.png?", "What is in c.png?", []),
    ],
)
def test_names_in_a_line(folder, line, question, names):
    found = split_line(line.format(folder))
    assert (found.question, found.names) == (question, [name.format(folder) for name in names])
    assert found.missing is None


@posix
@pytest.mark.parametrize("name", ["/no/such.png", "./c.png", "~/c.pdf", "../no/c.mp4"])
def test_a_path_that_is_none_is_told(folder, name):
    assert split_line(f"What is on {name}?").missing == name


def test_marks_of_several_lines():
    assert unquoted('"""What\nis it?"""') == "What\nis it?"
    assert unquoted('  """\nWhat is it?\n""" ') == "What is it?"
    assert unquoted('Say """') == 'Say """'


@posix
def test_messages_are_kept_for_their_owner_alone(tmp_path):
    path = tmp_path / "state" / "chat_history"
    history = KeptHistory(path)
    for text in ("one", "two\nlines", "x" * 20_000):
        history.store_string(text)
    assert [*KeptHistory(path).load_history_strings()] == ["two\nlines", "one"]
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    history.keeps = False
    history.store_string("secret")
    assert "secret" not in path.read_text()
    assert [*history.load_history_strings()] == []


def test_old_messages_go(tmp_path):
    path = tmp_path / "chat_history"
    path.write_text('{"\n' + "".join(f'"{i}"\n' for i in range(MAX_KEPT)))
    KeptHistory(path).store_string("last")
    kept = [*KeptHistory(path).load_history_strings()]
    assert kept[:2] == ["last", str(MAX_KEPT - 1)]
    assert len(kept) == MAX_KEPT // 2 + 1


def test_what_cannot_be_written_is_not_kept(tmp_path):
    (tmp_path / "file").touch()
    history = KeptHistory(tmp_path / "file" / "chat_history")
    history.store_string("one")
    assert [*history.load_history_strings()] == []


@posix
def test_the_folder_of_the_state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert history_file() == tmp_path / "edge-runtime" / "chat_history"
    assert history_file().is_absolute()


@posix
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/he", ["/help"]),
        ("/set ver", ["verbose"]),
        ("/show ", ["info", "parameters", "system"]),
        ("/image a", ["a.png"]),
        ("What is my", ["my\\ holiday.png"]),
        ("What is my\\ h", ["my\\ holiday.png"]),
        ("./b", ["./b.jpg"]),
        ("~/rep", ["~/report.pdf"]),
        ("Hello ", []),
        ("xyz", []),
    ],
)
def test_completion(folder, text, found):
    document, event = Document(text), CompleteEvent(completion_requested=True)
    assert [completion.text for completion in Words(COMMANDS).get_completions(document, event)] == found
