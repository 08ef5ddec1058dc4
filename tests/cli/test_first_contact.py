"""What a person sees in a terminal in the first minutes: the program at the end of a pseudo-terminal.

One chat serves all situations of `CHAT`, in order, as a person would go through them.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="there are no pseudo-terminals on Windows")
if not hasattr(pexpect, "spawn"):
    pytest.skip("there are no pseudo-terminals here", allow_module_level=True)

SIGN = Path(__file__).parents[2] / "examples" / "sign.png"
READY = "\x1b[?2004h"
"""Sent when a line can be typed: pastes are asked to be marked."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")
UP, TAB, CTRL_C, CTRL_D, ENTER = "\x1b[A", "\t", "\x03", "\x04", "\r"


def paste(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "work").mkdir()
    for name in ("sign.png", "my sign.png"):
        shutil.copy(SIGN, home / "work" / name)
    shutil.copy(SIGN, home / "other.png")
    (home / "work" / "notes.txt").write_text("Some notes.\n")
    return home


def start(home: Path, *arguments: str, **environment: str):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("XDG_STATE")}
    child = pexpect.spawn(
        sys.executable,
        ["-m", "edge_runtime", *arguments],
        cwd=str(home / "work"),
        env={**inherited, "HOME": str(home), "TERM": "xterm-256color", **environment},
        encoding="utf-8",
        timeout=120,
        dimensions=(50, 110),
    )
    child.delaybeforesend = None
    return child


def seen(text: str) -> str:
    """The characters of a terminal's output; a line that was drawn over shows what was drawn last."""
    plain = _ESCAPES.sub("", text).replace("\r\n", "\n")
    return "\n".join(line.rsplit("\r", 1)[-1] for line in re.sub(r"\r+\n", "\n", plain).split("\n"))


@pytest.fixture(scope="module")
def chat(home):
    child = start(home, "run", "--greedy")
    child.expect_exact(READY)
    child.greeting = child.before
    yield child
    child.close(force=True)


# What is typed, and what is then seen; "!" in front: what is not.
CHAT: list[tuple[str, str, tuple[str, ...]]] = [
    ("a path behind a question", "What does it say? sign.png" + ENTER, ("sign.png (320 x 160)", "\nCAFE\n")),
    ("named again", "What is in sign.png?" + ENTER, ("!goes with",)),
    ("forget", "/clear" + ENTER, ("The conversation is forgotten.",)),
    ("a path before it", "./sign.png What does it say?" + ENTER, ("sign.png (320 x 160)", "\nCAFE\n")),
    ("forget", "/clear" + ENTER, ("forgotten",)),
    ("dragged, with escapes", "What does it say? my\\ sign.png" + ENTER, ("my sign.png (320 x 160)", "\nCAFE\n")),
    ("forget", "/clear" + ENTER, ("forgotten",)),
    ("dragged, in quotes", "'my sign.png' What does it say?" + ENTER, ("my sign.png (320 x 160)", "\nCAFE\n")),
    ("forget", "/clear" + ENTER, ("forgotten",)),
    ("home", "What does it say? ~/other.png" + ENTER, ("other.png (320 x 160)", "\nCAFE\n")),
    ("forget", "/clear" + ENTER, ("forgotten",)),
    ("a path alone", "sign.png" + ENTER, ("sign.png (320 x 160) goes with the next question.", "!CAFE")),
    ("its question", "What does it say?" + ENTER, ("\nCAFE\n",)),
    ("no such file", "What is on ./none.png?" + ENTER, ("./none.png does not exist", "enter the line again")),
    ("a misspelled one", "sing.png" + ENTER, ("does not exist, but sign.png is there",)),
    ("a web address", "What is on https://host/a.png?" + ENTER, ("nothing is fetched",)),
    ("forget", "/clear" + ENTER, ("forgotten",)),
    ("Tab completes a command", "/he" + TAB + ENTER, ("/image FILE", "/set ", "Tab completes")),
    ("Ollama's help", "/?" + ENTER, ("/bye, /exit",)),
    ("Tab completes a file", "/image si" + TAB + ENTER, ("sign.png (320 x 160) goes with",)),
    ("Tab escapes blanks", "/image my" + TAB + ENTER, ("my sign.png (320 x 160) goes with",)),
    ("Tab completes a setting", "/set verb" + TAB + ENTER, ("Times and rates are shown",)),
    ("quiet again", "/set quiet" + ENTER, ("Times and rates are not shown",)),
    ("forget", "/clear" + ENTER, ("forgotten",)),
    ("a picture without a name", "/image" + ENTER, ("/image needs a file",)),
    ("a text file as a picture", "/image notes.txt" + ENTER, ("edge-runtime: ",)),
    ("a missing command", "/nope" + ENTER, ("There is no command /nope.",)),
    ("several lines", '"""What' + ENTER + 'does it say?"""' + ENTER, ('> """What\n. does it say?"""',)),
    ("a paste is one message", paste("One\nTwo\nThree") + ENTER, ("> One\n. Two\n. Three",)),
    ("the message before", UP + ENTER, ("> One\n. Two\n. Three",)),
    ("nothing typed", ENTER, ("!edge-runtime:",)),
    ("Ctrl-C at the line", "half a quest" + CTRL_C, ("Ctrl-D or /bye leaves the chat.",)),
    ("a parameter", "/set parameter temperature 0" + ENTER, ("temperature is 0.",)),
    ("a shorter answer", "/set parameter num_predict 1" + ENTER, ("num_predict is 1.",)),
    ("cut off", "Who are you?" + ENTER, ("The answer was cut off (length); /continue continues it.",)),
    ("continued", "/continue" + ENTER, ("!There is no answer",)),
    ("an unknown parameter", "/set parameter temp 1" + ENTER, ("There is no parameter 'temp'", "temperature, top_p")),
    ("no number", "/set parameter top_k many" + ENTER, ("top_k is 'many'; expected a whole number.",)),
    ("out of range", "/set parameter top_p 7" + ENTER, ("edge-runtime: top_p is 7",)),
    ("of the model", "/set parameter num_ctx 4096" + ENTER, ("num_ctx", "--ctx")),
    ("what is set", "/show parameters" + ENTER, ("num_predict         1", "temperature         0")),
    ("a system prompt", "/set system You read signs." + ENTER, ("The system prompt is set.",)),
    ("shown", "/show system" + ENTER, ("You read signs.",)),
    ("the model", "/show info" + ENTER, ("demo",)),
    ("nothing to show", "/show nothing" + ENTER, ("info, parameters, system",)),
    ("no such setting", "/set nothing" + ENTER, ("There is no setting 'nothing'",)),
    ("reasoning", "/set think" + ENTER, ("Reasoning is on.",)),
    ("no reasoning", "/set nothink" + ENTER, ("Reasoning is off.",)),
    ("JSON", "/set format json" + ENTER, ("Answers are JSON",)),
    ("free text", "/set noformat" + ENTER, ("Answers are free text.",)),
    ("no history", "/set nohistory" + ENTER, ("Messages are not kept",)),
    ("not kept", "/show info" + ENTER, ("demo",)),
]


def test_the_greeting(chat):
    greeting = seen(chat.greeting)
    assert "This model is a toy" in greeting
    assert greeting.rstrip().endswith("Chat with demo; /help lists the commands.")


@pytest.mark.parametrize(
    "number", range(len(CHAT)), ids=[f"{i}-{row[0].replace(' ', '-')}" for i, row in enumerate(CHAT)]
)
def test_in_the_chat(chat, number):
    _, typed, expected = CHAT[number]
    chat.send(typed)
    chat.expect_exact(READY)
    text = seen(chat.before)
    for what in expected:
        if what.startswith("!"):
            assert what[1:] not in text, text
        else:
            assert what in text, text


def test_leaving_the_chat(chat, home):
    chat.send(CTRL_D)
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    if sys.platform == "linux":
        kept = home / ".local/state/edge-runtime/chat_history"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert "a quest" not in kept.read_text()
        assert kept.read_text().splitlines()[-1] == '"/set nohistory"'


def test_messages_of_the_last_chat_come_back(home, chat):
    chat.close(force=True)
    child = start(home, "run")
    child.expect_exact(READY)
    child.send(UP + UP + ENTER)
    child.expect_exact("Answers are free text.")
    child.expect_exact(READY)
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.parametrize("terminal", ["xterm-256color", "dumb"])
def test_the_line_is_no_part_of_a_file_of_answers(home, terminal):
    child = pexpect.spawn(
        "/bin/sh",
        ["-c", f'"{sys.executable}" -m edge_runtime run --greedy > "{home}/answers.txt"'],
        cwd=str(home / "work"),
        env={**os.environ, "HOME": str(home), "TERM": terminal},
        encoding="utf-8",
        timeout=120,
    )
    ready = "> " if terminal == "dumb" else READY
    child.expect_exact(ready)
    child.send("sign.png" + ENTER)
    child.expect_exact("goes with")
    child.expect_exact(ready)
    child.send("What does it say?" + ENTER)
    child.expect_exact(ready)
    child.send("/bye" + ENTER)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert (home / "answers.txt").read_text() == "CAFE\n"


# Commands that end by themselves: arguments, exit code, what is seen.
COMMANDS: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = [
    (("-V",), 0, ("edge-runtime, version ",)),
    (("help",), 0, ("Usage: edge-runtime", "run ", "serve ", "pull ")),
    (("help", "run"), 0, ("Sampling:", "Pictures:", "Videos:")),
    (("rnu",), 2, ("No such command 'rnu'",)),
    (("list",), 0, ("demo", "a toy", "edge-runtime pull minicpm-v-4.5")),
    (("show", "demo"), 0, ("built in", "Apache-2.0")),
    (("run", "none.png", "What is it?"), 1, ("none.png does not exist",)),
    (("run", "sign.png", "What does it say?", "--greedy"), 0, ("This model is a toy", "CAFE")),
    (("run", "-q", "sign.png", "What does it say?", "--greedy"), 0, ("CAFE", "!toy", "!slices")),
    (("run", "-v", "demo", "sign.png", "What does it say?", "--greedy"), 0, ("CAFE", "prefill", "tokens/s")),
    (("run", "llava", "sign.png", "What does it say?"), 1, ("llava", "-m")),
    (("run", "minicpm-v", "sign.png", "What?"), 1, ("edge-runtime pull minicpm-v-4.5",)),
    (("run", "-", "What is it?"), 1, ("stdin is a terminal",)),
]


@pytest.mark.parametrize(("arguments", "code", "expected"), COMMANDS, ids=[" ".join(row[0]) for row in COMMANDS])
def test_commands(home, arguments, code, expected):
    child = start(home, *arguments)
    child.expect(pexpect.EOF)
    text = seen(child.before)
    child.close()
    assert child.exitstatus == code, text
    assert "Traceback" not in text
    for what in expected:
        assert (what[1:] not in text) if what.startswith("!") else (what in text), text


def test_ctrl_c_ends_the_answer_and_not_the_chat(home):
    child = start(home, "run", "--temperature", "2", "--no-repetition-check", EDGE_RUNTIME_NOHISTORY="1")
    child.expect_exact(READY)
    child.send("sign.png What does it say?" + ENTER)
    child.expect_exact("looking at")
    child.send(CTRL_C)
    child.expect_exact(READY)
    text = seen(child.before)
    assert "cancelled" in text or "Stopped." in text, text
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
