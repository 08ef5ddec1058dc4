"""The command line: what goes to stdout and stderr, exit codes, the chat, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_runtime import Model
from edge_runtime.cli.chat import Chat
from edge_runtime.cli.program import main
from edge_runtime.cli.terminal import Printer, printable
from edge_runtime.cli.words import parse_arguments
from edge_runtime.errors import ImageError

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "sign.png")
QUESTION = "What does it say?"


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def test_an_answer_is_all_that_stdout_gets():
    result = run("run", EXAMPLE, QUESTION, "--greedy")
    assert (result.exit_code, result.stdout) == (0, "CAFE\n")


def test_json_has_the_documented_fields():
    result = run("run", EXAMPLE, QUESTION, "--greedy", "--json")
    answer = json.loads(result.stdout)
    assert answer["answer"] == "CAFE"
    assert set(answer) == {
        *("answer", "reasoning", "finish_reason", "model", "prompt_tokens", "visual_tokens", "cached_tokens"),
        *("completion_tokens", "slices", "dropped_turns", "fitted_slices", "timings_s", "videos"),
        *("shortened", "tool_calls", "malformed_calls", "pictures", "reasoning_tokens"),
        *("prefix", "reasoning_prefix", "notice", "stop_string", "drafts"),
    }
    assert answer["slices"][0] == [154, 84]
    assert answer["cached_tokens"] == 0


def test_options_reach_the_model():
    one_slice = json.loads(run("run", EXAMPLE, QUESTION, "--json", "--max-slices", "1", "--max-tokens", "1").stdout)
    assert len(one_slice["slices"]) == 1
    assert (one_slice["finish_reason"], one_slice["completion_tokens"]) == ("length", 1)
    with_system = json.loads(run("run", "Hi", "--json", "--system", "Be kind. " * 20).stdout)
    assert with_system["prompt_tokens"] > json.loads(run("run", "Hi", "--json").stdout)["prompt_tokens"] + 20


def test_sampling_options_reach_the_request(monkeypatch):
    seen, submit = [], Model.submit
    monkeypatch.setattr(
        Model, "submit", lambda self, messages, **options: seen.append(options) or submit(self, messages, **options)
    )
    flags = [("--typical-p", 0.9), ("--presence-penalty", -0.5), ("--frequency-penalty", 0.25), ("--min-p", 0.1)]
    given = [part for name, value in flags for part in (name, str(value))]
    assert run("run", "Hi", "--max-tokens", "1", *given, "--no-repetition-check").exit_code == 0
    assert run("run", "Hi", "--max-tokens", "1", "--json", "--logprobs", "3").exit_code == 0
    options, plain = seen
    assert [options[name.strip("-").replace("-", "_")] for name, _ in flags] == [value for _, value in flags]
    assert (options["repetition_check"], options["logprobs"], options["beams"]) == (False, False, None)
    assert (plain["repetition_check"], plain["logprobs"], plain["top_logprobs"]) == (True, True, 3)
    assert plain["typical_p"] is None


def test_pictures_and_text_keep_their_order():
    content = parse_arguments(["look", "at", EXAMPLE, "and", EXAMPLE, "now"])
    assert content == ["look at", Path(EXAMPLE), "and", Path(EXAMPLE), "now"]


@pytest.mark.parametrize(
    "text", ["What is in photo.png?", "and/or", "a.b", "", "x" * 5000, "nul\0byte", "Describe a.jpg now"]
)
def test_questions_are_not_files(text):
    assert parse_arguments([text]) == [text]


@pytest.mark.parametrize("path", ["nope.png", "nope.JPEG", "./nope", "/nope", "~/nope", "clip.mp4", "C:\\a.png"])
def test_what_looks_like_a_file_must_exist(path):
    with pytest.raises(ImageError, match="does not exist"):
        parse_arguments([path])


def test_web_addresses_are_not_fetched():
    result = run("run", "https://host/a.png", "What?")
    assert result.exit_code == 1
    assert "nothing is fetched" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--max-tokens", "0", "Hi"],
        ["run", "--json"],
        ["convert", "x", "--type", "q9"],
        ["nope"],
        ["run", "--top-p", "2"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


def test_a_chat_over_a_pipe():
    lines = f"/image {EXAMPLE}\n{QUESTION}\n/clear\nHello\n/nope\n/image missing.png\n/exit\nnever asked\n"
    result = run("run", "--greedy", stdin=lines)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "CAFE"
    assert len(result.stdout.splitlines()) == 2
    assert "(320 x 160) goes with the next question" in result.stderr
    assert "no command /nope" in result.stderr
    assert "missing.png does not exist" in result.stderr


def test_a_chat_remembers_and_switches_reasoning(demo: Model, monkeypatch, capsys):
    asked = []

    def answer(model, messages, options, quiet=False):
        asked.append((len(messages), options["thinking"]))
        return demo.chat("Hello", greedy=True)

    monkeypatch.setattr("edge_runtime.cli.terminal.answer", answer)
    lines = iter(["one", "/think", "two", "/clear", "three"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    Chat(demo, [{"role": "system", "content": "s"}], {"thinking": False, "pixel_limit": 1}).loop([])
    assert asked == [(2, False), (4, True), (2, True)]


def test_reasoning_goes_to_stderr(capsys):
    printer = Printer(quiet=False)
    printer.write("because", "reasoning")
    printer.write("yes", "answer")
    printer.end()
    captured = capsys.readouterr()
    assert captured.out == "yes\n"
    assert "because" in captured.err


def test_a_picture_cannot_send_escape_sequences_to_the_terminal():
    assert printable("a\x1b[31mb\x07\r\n\tc\x9b") == "a[31mb\n\tc"


def test_info_tells_about_machine_model_and_file():
    machine = json.loads(run("info", "--json").stdout)
    assert {"cpu", "kernels", "prompts", "answers", "threads", "kernel cache", "llama-cpp-python"} <= set(machine)
    model = json.loads(run("info", "demo", "--json").stdout)
    assert model["visual tokens per slice"] == 16
    assert model["layers"] == 3
    file = str(Path(Model.load("demo").paths.mmproj))
    assert "vision layers" in run("info", file).stdout
    assert run("info", "nothing-there").exit_code == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_the_answer_not_the_chat(interruptible):
    """A real process: interrupted in a long answer, it answers the next question and leaves with 0."""
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_CHAT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("Hello\n")
    child.stdin.flush()
    assert child.stdout.read(1) == "H"
    child.send_signal(signal.SIGINT)
    child.stdin.write("/nope\n/exit\n")
    _, err = child.communicate(timeout=120)
    assert "no command /nope" in err
    assert "edge-runtime:" not in err
    assert "Traceback" not in err
    assert child.returncode == 0


# A chat with the demo model whose sampler takes a tenth of a second per token and never stops by itself.
SLOW_CHAT = """
import time
from edge_runtime.generation import sampling
from edge_runtime.cli.program import main
real, said = sampling.Sampler.sample, []
def slow(self, context, row):
    time.sleep(0.1)
    said.append(real(self, context, row)) if not said else None
    return said[0]
sampling.Sampler.sample = slow
main(["run", "--greedy", "--max-tokens", "2000"])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_a_single_question_with_130(interruptible):
    script = SLOW_CHAT.replace('["run",', '["run", "Hello",')
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "Traceback" not in err


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has no such permissions")
@pytest.mark.parametrize(
    "command", [["run", "{}/a.png", "q"], ["run", "-m", "{}/m", "q"], ["convert", "{}/m"], ["info", "{}/m"]]
)
def test_what_may_not_be_read_is_said_so(command):
    """As another user where the tests run as root, who may read everything."""
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        locked = Path(base) / "locked"
        (locked / "m").mkdir(parents=True)
        locked.chmod(0o000)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            result = run(*(part.format(locked) for part in command))
        finally:
            os.seteuid(user)
            locked.chmod(0o755)
    assert result.exit_code == 1, result.exception
    assert result.stderr.startswith("edge-runtime: ")
    assert "Traceback" not in result.stderr


def test_an_instruction_set_the_machine_lacks_is_one_sentence():
    environment = {**os.environ, "EDGE_RUNTIME_ISA": "abacus"}
    for command in (["run", "Hi"], ["info"]):
        done = subprocess.run(
            [sys.executable, "-m", "edge_runtime", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("edge-runtime: EDGE_RUNTIME_ISA is 'abacus'")
